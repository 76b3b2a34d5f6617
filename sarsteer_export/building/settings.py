"""Everything a build can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calibration.calibrate import CalibrationSettings
from calibration.errors import InputError
from calibration.model_options import ModelOptions
from calibration.overlap import AllowedOverlap
from engines.backends import CPU_BACKEND
from sarsteer_export.engine_build import EngineSettings
from sarsteer_export.judges.settings import JudgeSettings
from sarsteer_export.parity_run import ParitySettings

if TYPE_CHECKING:
    from pathlib import Path

BYTES_PER_PARAMETER = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class BuildSettings:
    """Everything a build can be told.

    `plan`: a ready plan file; calibration is then skipped, and `harmful` and `benign` serve parity alone.
    `eval_harmful`, `eval_benign`: held-out requests to measure behaviour on, both or none. `allow_overlap`: what
    they may share with the calibration set. `engine`: what to build beside the ONNX graphs. `loading`: how the model
    is loaded and driven. `allow_overflow`: build even where calibration saw values that float16 cannot square.
    `resume`: go on with a calibration that was interrupted.
    """

    harmful: Path
    benign: Path
    plan: Path | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    parity: ParitySettings = field(default_factory=ParitySettings)
    eval_harmful: Path | None = None
    eval_benign: Path | None = None
    allow_overlap: AllowedOverlap = AllowedOverlap.NONE
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    allow_overflow: bool = False
    max_new_tokens: int = 32
    keep_unsteered: bool = True
    loading: ModelOptions = field(default_factory=ModelOptions)
    device: str = "cpu"
    dtype: str = "float32"
    force: bool = False
    overwrite: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        if (self.eval_harmful is None) != (self.eval_benign is None):
            raise InputError("behaviour needs both --eval-harmful and --eval-benign; only one was given")
        if self.dtype not in BYTES_PER_PARAMETER:
            raise InputError(f"dtype is {self.dtype!r}; expected one of {', '.join(BYTES_PER_PARAMETER)}")
        if self.parity.backend != CPU_BACKEND.name:
            raise InputError(
                f"a build is proven on {CPU_BACKEND.name} first; name {self.parity.backend} among its engines"
            )
        object.__setattr__(self, "parity", dataclasses.replace(self.parity, precision=self.dtype))
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
