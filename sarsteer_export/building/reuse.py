"""What a second build takes from the bundle that stands at its output already."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError, UnsupportedError
from calibration.plan import SteeringPlan
from engines.opening import check_can_run
from engines.report import Verdict
from engines.sidecar import sidecar_of
from graph_passes.onnx_file import read_graph
from sarsteer_export.building.inputs import engine_stage
from sarsteer_export.bundle.manifest import (
    ENGINES_FOLDER,
    ONNX_FOLDER,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    EngineEntry,
    Manifest,
)
from sarsteer_export.range_guard import check_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sarsteer_export.building.inputs import BuildInputs
    from sarsteer_export.building.settings import BuildSettings

logger = logging.getLogger(__name__)


def earlier_bundle(target: Path) -> Manifest | None:
    """The manifest of the bundle that stands at the output, if there is a sound one."""
    try:
        return Manifest.read(target)
    except InputError:
        return None


def reusable_stages(target: Path, earlier: Manifest | None, inputs: BuildInputs) -> tuple[str, ...]:
    """Stages of the bundle at the output whose inputs are the same and whose files are what they were.

    A verdict that is still owed, of an engine that could not be run and can be now, is no finished stage.
    """
    if earlier is None:
        return ()
    exported = _exported_files(earlier)
    files = {
        "calibrate": [PLAN.as_posix()],
        "export": exported,
        **{engine_stage(entry.backend): _engine_files(entry) for entry in earlier.engines},
        "verify": list(earlier.files),
    }
    if UNSTEERED_DECODER.as_posix() not in exported:
        del files["export"]
    fresh = []
    for stage, names in files.items():
        if stage not in inputs.stages or earlier.stages.get(stage) != inputs.stages[stage]:
            continue
        if (altered := earlier.altered(target, names)) is not None:
            logger.warning("%s: was altered since it was built; %s is not reused", target / altered, stage)
            continue
        if stage == "verify" and (label := _can_be_run_now(earlier)) is not None:
            logger.warning(
                "%s: engine %s was built and not executed, and this machine can run it; verify is not reused",
                target,
                label,
            )
            continue
        fresh.append(stage)
    return tuple(fresh)


def check_known_range(target: Path, reusable: Sequence[str], settings: BuildSettings) -> None:
    """Hold the guard against what a build takes from the bundle at its output, as far as that has plan and graph.

    Whether an overflow was allowed then says nothing of now. Raises `InputError` as `check_range` does.
    """
    if settings.plan is not None:
        plan = settings.plan
    elif "calibrate" in reusable:
        plan = target / PLAN
    else:
        return
    if "verify" in reusable:
        decoder = STEERED_DECODER
    elif "export" in reusable:
        decoder = UNSTEERED_DECODER
    else:
        return
    check_range(SteeringPlan.load(plan), read_graph(target / decoder), allow_overflow=settings.allow_overflow)


def _can_be_run_now(manifest: Manifest) -> str | None:
    """The first engine that was not executed when it was built, and can be now."""
    for entry in manifest.engines:
        if entry.verdict == Verdict.NOT_EXECUTED.value:
            with suppress(UnsupportedError):
                check_can_run(entry.row)
                return entry.label
    return None


def _exported_files(manifest: Manifest) -> list[str]:
    """What `export` wrote into a bundle: everything in its ONNX folder but the steered decoder."""
    inside = f"{ONNX_FOLDER.as_posix()}/"
    return [name for name in manifest.files if name.startswith(inside) and name != STEERED_DECODER.as_posix()]


def _engine_files(entry: EngineEntry) -> list[str]:
    """The engines of an entry and their sidecars; none for an execution provider, which runs the graphs."""
    inside = f"{ENGINES_FOLDER.as_posix()}/"
    engines = [file for file in entry.components.values() if file.startswith(inside)]
    return [*engines, *(sidecar_of(Path(file)).as_posix() for file in engines)]


def copy_export(target: Path, manifest: Manifest, folder: Path) -> None:
    """Copy the exported files of an earlier bundle into a new bundle's folder."""
    _copy(target, folder, _exported_files(manifest))


def copy_engine(target: Path, entry: EngineEntry, folder: Path) -> EngineEntry:
    """Copy the engines of an entry of an earlier bundle into a new bundle's folder; they are proven anew."""
    _copy(target, folder, _engine_files(entry))
    return entry


def _copy(target: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target / name, folder / name)
