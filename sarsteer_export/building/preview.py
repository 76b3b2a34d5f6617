"""`build --dry-run`: what a build would do, and need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.checkpoint import parameter_count
from sarsteer_export.building.inputs import read_inputs
from sarsteer_export.building.reuse import check_known_range, earlier_bundle, reusable_stages
from sarsteer_export.building.space import MEMORY_PER_PARAMETER, check_space, disk_bytes, needed_bytes
from sarsteer_export.staging import check_output

if TYPE_CHECKING:
    from sarsteer_export.building.settings import BuildSettings


@dataclass(frozen=True)
class BuildPreview:
    """What a build would do: steps with their fate, and estimates of what it needs."""

    steps: tuple[tuple[str, str], ...]
    parameters: int
    disk_bytes: int
    memory_bytes: int


def preview(model: str | Path, output: str | Path, settings: BuildSettings) -> BuildPreview:
    """Say what `build` would do and need, and write nothing.

    Raises what bad input would raise, as far as it shows without loading the model: samples are not read.
    """
    target = Path(output)
    inputs = read_inputs(Path(model), settings)
    earlier = earlier_bundle(target)
    parameters = parameter_count(inputs.model)
    disk = disk_bytes(inputs.model, settings)
    reusable = reusable_stages(target, earlier, inputs)
    check_known_range(target, reusable, settings)
    if "verify" in reusable:
        steps = [(stage, "up to date") for stage in inputs.stages]
    else:
        check_output(target, overwrite=settings.overwrite)
        check_space(target, needed_bytes(inputs.model, settings))
        steps = [(stage, "reused" if stage in reusable else "run") for stage in inputs.stages]
    memory = parameters * MEMORY_PER_PARAMETER[settings.dtype]
    return BuildPreview(tuple(steps), parameters, disk, memory)
