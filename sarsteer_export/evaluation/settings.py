"""What an evaluation can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibration.overlap import AllowedOverlap
from calibration.records import ReadSettings
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.evaluation.measure import MeasureSettings
from sarsteer_export.judges.settings import JudgeSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from calibration.model_options import ModelOptions
    from calibration.plan import SteeringPlan


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything an evaluation can be told.

    `plans`: plans or their files by label; beside a bundle's own, which an entry with the same edits only names. A
    checkpoint without any is asked undefended alone.
    `model`: the checkpoint a bundle was made from, to ask the eager model too. `engine`: what runs the bundle, by
    default ONNX Runtime on the CPU; a checkpoint takes neither. `random_seeds`: one random control per plan and seed;
    none leaves them out. `limit`: the most requests of each kind, drawn with the seed of `bootstrap`. `loading`: how
    the eager model is loaded and driven. `dtype`: its precision, by default the bundle's, else float32. `device_map`:
    how accelerate spreads it over devices, instead of `device`.
    """

    harmful: str | Path
    benign: str | Path
    plans: Mapping[str, str | Path | SteeringPlan] = field(default_factory=dict)
    model: str | Path | None = None
    engine: str | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    random_seeds: tuple[int, ...] = (0, 1, 2)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    data: ReadSettings = field(default_factory=ReadSettings)
    allow_overlap: AllowedOverlap = AllowedOverlap.NONE
    limit: int | None = None
    loading: ModelOptions | None = None
    device: str = "cpu"
    device_map: str | dict[str, Any] | None = None
    dtype: str | None = None
    force: bool = False
