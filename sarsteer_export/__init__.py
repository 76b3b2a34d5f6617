"""Bake SARSteer activation steering into ONNX decoders of Large Audio-Language Models, and prove it.

The public API is what this module names. Importing it imports neither torch nor a runtime; each name loads
its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.calibrate import CalibrationSettings, calibrate
    from calibration.directions import SteeringSettings
    from calibration.errors import SarsteerError
    from calibration.plan import Add, Positions, Project, Site, SteeringPlan
    from calibration.steered import steered
    from graph_passes.audit_report import AuditReport
    from sarsteer_export.auditing import audit
    from sarsteer_export.build_inputs import BuildSettings
    from sarsteer_export.bundle.bundle import Bundle, load_bundle
    from sarsteer_export.engine_build import EngineSettings, build_engines
    from sarsteer_export.exporting.export import export
    from sarsteer_export.parity_run import ParitySettings
    from sarsteer_export.patching import patch
    from sarsteer_export.pipeline import build
    from sarsteer_export.refitting import refit
    from sarsteer_export.verification import verify

_HOMES = {
    "Add": "calibration.plan",
    "AuditReport": "graph_passes.audit_report",
    "BuildSettings": "sarsteer_export.build_inputs",
    "Bundle": "sarsteer_export.bundle.bundle",
    "CalibrationSettings": "calibration.calibrate",
    "EngineSettings": "sarsteer_export.engine_build",
    "ParitySettings": "sarsteer_export.parity_run",
    "Positions": "calibration.plan",
    "Project": "calibration.plan",
    "SarsteerError": "calibration.errors",
    "Site": "calibration.plan",
    "SteeringPlan": "calibration.plan",
    "SteeringSettings": "calibration.directions",
    "audit": "sarsteer_export.auditing",
    "build": "sarsteer_export.pipeline",
    "build_engines": "sarsteer_export.engine_build",
    "calibrate": "calibration.calibrate",
    "export": "sarsteer_export.exporting.export",
    "load_bundle": "sarsteer_export.bundle.bundle",
    "patch": "sarsteer_export.patching",
    "refit": "sarsteer_export.refitting",
    "steered": "calibration.steered",
    "verify": "sarsteer_export.verification",
}

__all__ = [
    "Add",
    "AuditReport",
    "BuildSettings",
    "Bundle",
    "CalibrationSettings",
    "EngineSettings",
    "ParitySettings",
    "Positions",
    "Project",
    "SarsteerError",
    "Site",
    "SteeringPlan",
    "SteeringSettings",
    "audit",
    "build",
    "build_engines",
    "calibrate",
    "export",
    "load_bundle",
    "patch",
    "refit",
    "steered",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
