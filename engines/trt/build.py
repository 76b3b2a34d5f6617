"""Build an engine from an ONNX file: parse, check, configure, build, and say in a sidecar what came out."""

from __future__ import annotations

import hashlib
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import EngineError, InputError, UnsupportedError
from engines.cuda_driver import cuda_driver
from engines.memory import peak_memory
from engines.sidecar import Binding, BuildFacts, EngineRecord, Profile, Refit, sidecar_of
from engines.trt.api import log_of
from engines.trt.network import Network, RequiredConstant, check_inputs, parse, require_constants
from engines.trt.worker import run_interruptibly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from engines.backends import Backend

    Progress = Callable[[str, int, int], None]

PERCENT = 100
MAX_LOG_LINES = 20


@dataclass(frozen=True)
class EngineSource:
    """What an engine is built from: a graph file, its interface, and where it came from.

    `precision`: the dtype its floating-point tensors have. `identity`: file names and hashes for the sidecar.
    `constants` must reach the network; those marked are the only weights that a refit may swap. `plan_sha256`: the
    plan that is baked into the graph, if there is one. `content`: a serialized graph in place of the file's own.
    """

    graph: Path
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    precision: str
    identity: dict[str, Any]
    constants: tuple[RequiredConstant, ...] = ()
    plan_sha256: str | None = None
    content: bytes | None = None


def check_can_build(backend: Backend, compute_capabilities: Sequence[str] = ()) -> None:
    """Raise `UnsupportedError`, with the remedy, when engines of this backend cannot be built on this machine."""
    trt: Any = backend.load()
    problem = cuda_driver().problem
    if problem is not None and not backend.builds_without_gpu:
        raise UnsupportedError(
            f"{backend.name} builds on the kind of GPU that the engine will run on, and {problem} here; build on "
            "such a machine, or use --engine tensorrt-rtx, which builds anywhere"
        )
    if compute_capabilities and not backend.targets:
        raise InputError(f"--compute-capability: {backend.name} always builds for the GPU of this machine")
    for capability in compute_capabilities:
        _capability(trt, backend, capability)


def build_engine(
    source: EngineSource,
    output: Path,
    backend: Backend,
    profiles: Sequence[Profile],
    *,
    compute_capabilities: Sequence[str] = (),
    progress: Progress | None = None,
) -> EngineRecord:
    """Build an engine, write it to `output` and its sidecar beside it.

    Profiles must fit the graph (`engines.profiles`). `compute_capabilities`: CUDA compute capabilities to build
    for, the backend's own choice when empty. Raises `UnsupportedError` when this machine cannot build it,
    `EngineError` with TensorRT's own log lines when the build fails, and `KeyboardInterrupt` (nothing written)
    when it is interrupted.
    """
    check_can_build(backend, compute_capabilities)
    trt: Any = backend.load()
    log = log_of(backend)
    stage = f"build {output.stem} for {backend.name}"
    start = time.monotonic()
    with peak_memory() as peak:
        network = run_interruptibly(lambda: parse(source.graph, backend, source.content))
        check_inputs(network, {binding.name: binding.dtype for binding in source.inputs})
        steering = require_constants(network, source.constants)
        config = network.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        refit = _allow_refit(trt, network, config, source.constants)
        targets = _set_targets(trt, backend, config, compute_capabilities)
        _add_profiles(network, config, profiles)
        serialized = _build(trt, network, config, _Monitor(stage, progress))
        if serialized is None and refit.constants:
            refit = _forbid_refit(trt, network, config, refit)
            serialized = _build(trt, network, config, _Monitor(stage, progress))
        if serialized is None:
            raise EngineError(_failure(backend, source.graph, log.errors))
        digest = hashlib.sha256(serialized)
        output.write_bytes(serialized)
        size = int(serialized.nbytes)
        layers = network.num_layers
        del serialized
    record = EngineRecord(
        backend=backend.name,
        backend_version=backend.version(),
        compute_capabilities=targets,
        precision=source.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=tuple(profiles),
        graph=source.identity,
        engine={"file": output.name, "bytes": size, "sha256": digest.hexdigest()},
        plan_sha256=source.plan_sha256,
        steering=steering,
        refit=refit,
        build=BuildFacts(
            round(time.monotonic() - start, 3),
            peak.peak_bytes,
            peak.start_bytes,
            layers,
            f"{platform.system()} {platform.machine()}",
        ),
        warnings=tuple(log.warnings[:MAX_LOG_LINES]),
    )
    record.write(sidecar_of(output))
    return record


def _allow_refit(trt: Any, network: Network, config: Any, constants: Sequence[RequiredConstant]) -> Refit:
    """Mark those constants, and nothing else, as weights that may be swapped later; or say why not."""
    names = tuple(constant.name for constant in constants if constant.refittable)
    if not names:
        return Refit((), "the graph holds no steering constants")
    if (problem := cuda_driver().problem) is not None:
        return Refit(
            (), f"{network.backend.name} builds refittable engines only where there is a GPU; {problem}"
        )
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in names:
        if not network.definition.mark_weights_refittable(name):
            raise EngineError(
                f"{network.backend.name} does not let {name!r} be refitted: "
                + "; ".join(log_of(network.backend).errors)
            )
    return Refit(names, None)


def _forbid_refit(trt: Any, network: Network, config: Any, refit: Refit) -> Refit:
    """Go on without: an engine that cannot be refitted is worth more than none."""
    told = next(iter(log_of(network.backend).errors), "it does not say why")
    config.clear_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in refit.constants:
        network.definition.unmark_weights_refittable(name)
    log_of(network.backend).start()
    return Refit((), f"{network.backend.name} could not build it refittable: {told}")


def _set_targets(
    trt: Any, backend: Backend, config: Any, compute_capabilities: Sequence[str]
) -> tuple[str, ...]:
    if not backend.targets:
        return (cuda_driver().gpus[0].compute_capability,)
    if not compute_capabilities:
        return backend.targets
    config.num_compute_capabilities = len(compute_capabilities)
    for number, capability in enumerate(compute_capabilities):
        config.set_compute_capability(_capability(trt, backend, capability), number)
    return tuple(compute_capabilities)


def _capability(trt: Any, backend: Backend, capability: str) -> Any:
    known = {
        f"{name[2:-1]}.{name[-1]}": getattr(trt.ComputeCapability, name)
        for name in dir(trt.ComputeCapability)
        if name.startswith("SM") and name[2:].isdigit()
    }
    if capability not in known:
        raise UnsupportedError(
            f"--compute-capability {capability}: {backend.name} {backend.version()} builds for "
            f"{', '.join(sorted(known, key=float))}"
        )
    return known[capability]


def _add_profiles(network: Network, config: Any, profiles: Sequence[Profile]) -> None:
    for profile in profiles:
        shapes = network.builder.create_optimization_profile()
        for name, allowed in profile.shapes.items():
            try:
                shapes.set_shape(name, allowed.min, allowed.opt, allowed.max)
            except (RuntimeError, TypeError, ValueError) as error:
                raise EngineError(
                    f"{network.backend.name} refuses shapes {allowed} of {name!r} in profile {profile.name!r}: {error}"
                ) from error
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"{network.backend.name} refuses profile {profile.name!r}: "
                + "; ".join(log_of(network.backend).errors)
            )


class _Monitor:
    """Progress of a build in percent, and the wish to cancel it."""

    def __init__(self, stage: str, progress: Progress | None) -> None:
        self.cancelled = False
        self._stage, self._progress = stage, progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._shown = 0

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> None:
        parent, steps, _ = self._phases[phase]
        self._phases[phase] = (parent, steps, step + 1)
        self._show(phase)

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

    def done(self) -> None:
        """Show the end, which phases only come close to."""
        self._report(PERCENT)

    def _show(self, phase: str | None) -> None:
        share = 0.0
        while phase is not None and phase in self._phases:
            phase, steps, done = self._phases[phase]
            share = min((done + share) / steps, 1.0)
        self._report(min(int(share * PERCENT), PERCENT - 1))

    def _report(self, percent: int) -> None:
        if self._progress is not None and percent > self._shown:
            self._shown = percent
            self._progress(self._stage, percent, PERCENT)


def _build(trt: Any, network: Network, config: Any, monitor: _Monitor) -> Any:
    """The serialized engine, or None when TensorRT fails."""

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            monitor.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            monitor.step(phase, step)
            return not monitor.cancelled

        def phase_finish(self, phase: str) -> None:
            monitor.finish(phase)

    config.progress_monitor = watcher = ProgressMonitor()
    serialized = run_interruptibly(
        lambda: network.builder.build_serialized_network(network.definition, config), monitor.cancel
    )
    del watcher  # the configuration keeps no reference of its own
    if serialized is not None:
        monitor.done()
    return serialized


def _failure(backend: Backend, graph: Path, errors: Sequence[str]) -> str:
    told = errors[:MAX_LOG_LINES] or ["it does not say why"]
    return f"{backend.name} {backend.version()} cannot build an engine of {graph}:\n  " + "\n  ".join(told)
