"""The engines of a bundle: built from its graphs, each proven where it can be run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from calibration.errors import UnsupportedError
from engines.backends import Backend, Runtime
from engines.limits import limits_for
from engines.opening import check_can_run
from engines.profiles import derive_profiles
from engines.sidecar import ENGINE_SUFFIX, EngineRecord, sidecar_of
from engines.trt.build import build_engine, check_can_build
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import (
    DECODER,
    ENGINES_FOLDER,
    UNSTEERED_DECODER,
    EngineEntry,
    Manifest,
)
from sarsteer_export.engine_build import EngineSettings, engine_source, label
from sarsteer_export.parity_runtime import OnnxRuntimeParity, ParityRuntime, TensorRTParity

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.states import Progress
    from engines.report import ParityReport
    from engines.sidecar import Profile
    from engines.trt.build import EngineSource
    from sarsteer_export.parity_run import ParityRun


def check_engines(settings: EngineSettings, precision: str) -> None:
    """Raise `UnsupportedError` for engines that cannot be built here or could not be proven."""
    for backend in settings.backends:
        limits_for(backend.name, precision)
        if backend.runtime is Runtime.TENSORRT:
            check_can_build(backend, settings.compute_capabilities)
        else:
            backend.load()


def add_engine(
    folder: Path,
    backend: Backend,
    settings: EngineSettings,
    *,
    longest: int | None = None,
    progress: Progress | None = None,
) -> EngineEntry:
    """Build the engines of one backend into a bundle folder; `longest`: the most positions the model knows.

    For an execution provider of ONNX Runtime nothing is built: it runs the bundle's graphs.
    """
    components = Manifest.read(folder).components
    sources = {name: engine_source(folder / file) for name, file in components.items()}
    precision = sources[DECODER].precision
    if backend.runtime is Runtime.ONNX_RUNTIME:
        files = {name: file.as_posix() for name, file in components.items()}
        return EngineEntry(backend.name, backend.version(), precision, files)
    target = ENGINES_FOLDER / label(backend, settings, precision)
    (folder / target).mkdir(parents=True)
    files = {}
    for name, source in sources.items():
        file = target / f"{name}{ENGINE_SUFFIX}"
        build_engine(
            source,
            folder / file,
            backend,
            _profiles(name, source, settings, longest),
            compute_capabilities=settings.compute_capabilities,
            progress=progress,
        )
        files[name] = file.as_posix()
    return EngineEntry(backend.name, backend.version(), precision, files)


def prove_engine(
    run: ParityRun, folder: Path, entry: EngineEntry, unsteered: Path | None = None
) -> tuple[EngineEntry, ParityReport]:
    """Parity of a bundle's engine, or the report that it cannot be run on this machine.

    `run`: parity of the same model and plan on ONNX Runtime's CPU provider. `unsteered`: the unsteered decoder, by
    default the bundle's. An engine is compared in what it ships: logits and cache, not blocks. Raises
    `ParityError` when even the unsteered decoder disagrees there.
    """
    backend = entry.row
    settings = dataclasses.replace(
        run.settings,
        backend=backend.name,
        blocks=run.settings.blocks and backend.runtime is Runtime.ONNX_RUNTIME,
    )
    again = dataclasses.replace(run, settings=settings, runtime=_runtime_of(folder, entry))
    reason = None
    try:
        check_can_run(backend)
        with Bundle(folder, engine=backend.name) as bundle:
            around = again.check_around_decoder(bundle)
        exported = again.check_export(folder / UNSTEERED_DECODER if unsteered is None else unsteered)
        report = again.check_steering(exported, folder / entry.components[DECODER], around)
    except UnsupportedError as error:
        # Also what only shows when it is opened: missing libraries, another kind of GPU.
        reason = str(error)
        report = again.not_executed(reason)
    return dataclasses.replace(entry, verdict=report.verdict.value, reason=reason), report


def rows_of(folder: Path, entry: EngineEntry) -> int | None:
    """The most requests that the engines of a bundle answer at once; None where nothing bounds them."""
    if entry.row.runtime is Runtime.ONNX_RUNTIME:
        return None
    records = [EngineRecord.read(sidecar_of(folder / file)) for file in entry.components.values()]
    return min(_rows(record) for record in records if record.profiles)


def _rows(record: EngineRecord) -> int:
    """The largest batch that any profile admits; it is the first dimension of the first input."""
    return max(profile.shapes[record.inputs[0].name].max[0] for profile in record.profiles)


def _runtime_of(folder: Path, entry: EngineEntry) -> ParityRuntime:
    if entry.row.runtime is Runtime.ONNX_RUNTIME:
        return OnnxRuntimeParity(entry.row)
    return TensorRTParity(entry.row, EngineRecord.read(sidecar_of(folder / entry.components[DECODER])))


def _profiles(
    name: str, source: EngineSource, settings: EngineSettings, longest: int | None
) -> tuple[Profile, ...]:
    if name == DECODER:
        return settings.decoder_profiles(source.inputs, longest)
    return derive_profiles(source.inputs, settings.limits(longest))
