"""Bake SARSteer activation steering into ONNX decoders of Large Audio-Language Models, and prove it.

The public API is what this module names. Importing it imports neither torch nor a runtime; each name loads
its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.calibrate import CalibrationSettings, calibrate
    from calibration.combine import CombineRule, combine_plans
    from calibration.decoder_parts import PartNames
    from calibration.directions import SteeringSettings
    from calibration.errors import SarsteerError
    from calibration.model_adapter import ModelAdapter
    from calibration.model_options import ModelOptions
    from calibration.plan import Add, Positions, Project, Site, SteeringPlan
    from calibration.steered import steered
    from graph_passes.audit_report import AuditReport
    from graph_passes.selection import LastFrom, PromptFrom, SteeringInputs, StrengthInput
    from sarsteer_export.auditing import audit
    from sarsteer_export.building.settings import BuildSettings
    from sarsteer_export.bundle.bundle import Bundle, load_bundle
    from sarsteer_export.engine_build import EngineSettings, build_engines
    from sarsteer_export.evaluation.evaluate import evaluate
    from sarsteer_export.evaluation.intervals import Bootstrap
    from sarsteer_export.evaluation.measure import MeasureSettings
    from sarsteer_export.evaluation.settings import EvaluationSettings
    from sarsteer_export.exporting.export import export
    from sarsteer_export.interchange.convert import ConversionSettings, convert
    from sarsteer_export.interchange.fitting import AllowedLosses
    from sarsteer_export.judges.settings import JudgeSettings
    from sarsteer_export.parity_run import ParitySettings
    from sarsteer_export.patching import PatchSettings, patch, unpatch
    from sarsteer_export.pipeline import build
    from sarsteer_export.refitting import refit
    from sarsteer_export.sweeping.choice import Candidates
    from sarsteer_export.sweeping.grid import Grid
    from sarsteer_export.sweeping.limits import Limits
    from sarsteer_export.sweeping.settings import SweepSettings
    from sarsteer_export.sweeping.sweep import sweep
    from sarsteer_export.verification import verify

_HOMES = {
    "Add": "calibration.plan",
    "AllowedLosses": "sarsteer_export.interchange.fitting",
    "AuditReport": "graph_passes.audit_report",
    "Bootstrap": "sarsteer_export.evaluation.intervals",
    "BuildSettings": "sarsteer_export.building.settings",
    "Bundle": "sarsteer_export.bundle.bundle",
    "CalibrationSettings": "calibration.calibrate",
    "Candidates": "sarsteer_export.sweeping.choice",
    "CombineRule": "calibration.combine",
    "ConversionSettings": "sarsteer_export.interchange.convert",
    "EngineSettings": "sarsteer_export.engine_build",
    "EvaluationSettings": "sarsteer_export.evaluation.settings",
    "Grid": "sarsteer_export.sweeping.grid",
    "JudgeSettings": "sarsteer_export.judges.settings",
    "LastFrom": "graph_passes.selection",
    "Limits": "sarsteer_export.sweeping.limits",
    "MeasureSettings": "sarsteer_export.evaluation.measure",
    "ModelAdapter": "calibration.model_adapter",
    "ModelOptions": "calibration.model_options",
    "ParitySettings": "sarsteer_export.parity_run",
    "PartNames": "calibration.decoder_parts",
    "PatchSettings": "sarsteer_export.patching",
    "Positions": "calibration.plan",
    "Project": "calibration.plan",
    "PromptFrom": "graph_passes.selection",
    "SarsteerError": "calibration.errors",
    "Site": "calibration.plan",
    "SteeringInputs": "graph_passes.selection",
    "SteeringPlan": "calibration.plan",
    "SteeringSettings": "calibration.directions",
    "StrengthInput": "graph_passes.selection",
    "SweepSettings": "sarsteer_export.sweeping.settings",
    "audit": "sarsteer_export.auditing",
    "build": "sarsteer_export.pipeline",
    "build_engines": "sarsteer_export.engine_build",
    "calibrate": "calibration.calibrate",
    "combine_plans": "calibration.combine",
    "convert": "sarsteer_export.interchange.convert",
    "evaluate": "sarsteer_export.evaluation.evaluate",
    "export": "sarsteer_export.exporting.export",
    "load_bundle": "sarsteer_export.bundle.bundle",
    "patch": "sarsteer_export.patching",
    "refit": "sarsteer_export.refitting",
    "steered": "calibration.steered",
    "sweep": "sarsteer_export.sweeping.sweep",
    "unpatch": "sarsteer_export.patching",
    "verify": "sarsteer_export.verification",
}

__all__ = [
    "Add",
    "AllowedLosses",
    "AuditReport",
    "Bootstrap",
    "BuildSettings",
    "Bundle",
    "CalibrationSettings",
    "Candidates",
    "CombineRule",
    "ConversionSettings",
    "EngineSettings",
    "EvaluationSettings",
    "Grid",
    "JudgeSettings",
    "LastFrom",
    "Limits",
    "MeasureSettings",
    "ModelAdapter",
    "ModelOptions",
    "ParitySettings",
    "PartNames",
    "PatchSettings",
    "Positions",
    "Project",
    "PromptFrom",
    "SarsteerError",
    "Site",
    "SteeringInputs",
    "SteeringPlan",
    "SteeringSettings",
    "StrengthInput",
    "SweepSettings",
    "audit",
    "build",
    "build_engines",
    "calibrate",
    "combine_plans",
    "convert",
    "evaluate",
    "export",
    "load_bundle",
    "patch",
    "refit",
    "steered",
    "sweep",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
