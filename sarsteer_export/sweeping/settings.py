"""Everything a sweep can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calibration.calibrate import REFUSAL_PROMPT, CalibrationSettings
from calibration.errors import InputError
from calibration.model_options import ModelOptions
from calibration.overlap import AllowedOverlap
from calibration.records import ReadSettings
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.evaluation.measure import MeasureSettings
from sarsteer_export.judges.settings import JudgeSettings
from sarsteer_export.sweeping.choice import Candidates
from sarsteer_export.sweeping.grid import Grid, geometric
from sarsteer_export.sweeping.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

ALPHAS = tuple(geometric(0.01, 1.0, 21))
"""Ten to a decade, a decade on either side of the paper's 0.1: the length of the refusal direction differs by model."""


@dataclass(frozen=True)
class SweepSettings:
    """Everything a sweep can be told.

    `harmful`, `benign`: requests to calibrate on, at most `limit` of each kind, drawn with the seed of `bootstrap`.
    `eval_harmful`, `eval_benign`: requests to choose by, at most `eval_limit`; figures to be reported need a third
    set. `early_stop`: a line is given up when so many alphas in succession left no benign request answered; 0
    measures all. `loading`: how the checkpoint is loaded and driven. `device_map`: how accelerate spreads it over
    devices, instead of `device`.
    """

    harmful: str | Path
    benign: str | Path
    eval_harmful: str | Path
    eval_benign: str | Path
    grid: Grid = field(default_factory=lambda: Grid(ALPHAS))
    limits: Limits = field(default_factory=Limits)
    candidates: Candidates = Candidates.ABLATED
    early_stop: int = 3
    refusal_prompt: str = REFUSAL_PROMPT
    limit: int | None = 100
    eval_limit: int | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    data: ReadSettings = field(default_factory=ReadSettings)
    allow_overlap: AllowedOverlap = AllowedOverlap.NONE
    device: str = "cpu"
    device_map: str | dict[str, str | int] | None = None
    dtype: str = "float32"
    loading: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.early_stop < 0:
            raise InputError(f"early_stop is {self.early_stop}; expected at least 0")
        if not self.refusal_prompt:
            raise InputError("the refusal prompt is empty; without it there is no refusal direction")

    @property
    def calibration(self) -> CalibrationSettings:
        """How statistics are collected."""
        return CalibrationSettings(
            refusal_prompt=self.refusal_prompt,
            limit=self.limit,
            seed=self.bootstrap.seed,
            batch_size=self.measure.batch_size,
            data=self.data,
        )
