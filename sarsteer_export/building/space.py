"""What a build needs: room on the disk, and memory."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from calibration.checkpoint import parameter_count
from calibration.errors import InputError
from engines.backends import Runtime
from sarsteer_export.building.settings import BYTES_PER_PARAMETER
from sarsteer_export.staging import nearest_folder

if TYPE_CHECKING:
    from pathlib import Path

    from sarsteer_export.building.settings import BuildSettings

BYTES_BESIDE_WEIGHTS = 2_000_000
"""Graphs, tokenizer and reports of a small model's bundle; a 7B's are some megabytes more."""
BYTES_BESIDE_ENGINE_WEIGHTS = 12_000_000
"""What an engine of TensorRT-RTX holds beside its weights, its kernels: `benchmarks/engine_build.py` shows its size."""
MEMORY_PER_PARAMETER = {"float32": 12, "float16": 6, "bfloat16": 14}
"""Bytes held at once at the peak: the eager model, the traced program and a runtime session; in bfloat16 the model,
its copy in float32 and two sessions of the float32 twin."""


def needed_bytes(model: Path, settings: BuildSettings) -> int:
    """About how much room a build takes at its peak: the bundle and, in bfloat16, its float32 twin."""
    twin = parameter_count(model) * BYTES_PER_PARAMETER["float32"] if settings.dtype == "bfloat16" else 0
    return disk_bytes(model, settings) + twin


def disk_bytes(model: Path, settings: BuildSettings) -> int:
    """About how large the bundle will be: the weights once for the graphs and once for every engine."""
    built = [row for row in settings.engine.backends if row.runtime is Runtime.TENSORRT]
    weights = parameter_count(model) * BYTES_PER_PARAMETER[settings.dtype]
    return weights + BYTES_BESIDE_WEIGHTS + len(built) * (weights + BYTES_BESIDE_ENGINE_WEIGHTS)


def check_space(target: Path, needed: int) -> None:
    """Raise `InputError` when fewer than `needed` bytes are free where the bundle will be."""
    free = shutil.disk_usage(nearest_folder(target)).free
    if free < needed:
        raise InputError(
            f"{target}: building the bundle needs about {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there"
        )
