"""`build-engine`: from an ONNX file to engines, with the steering followed into each of them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import InputError, UnsupportedError
from engines.backends import Backend, Runtime, find_backend
from engines.input_roles import fixed_dims
from engines.profiles import ProfileLimits, derive_profiles, explicit_profiles
from engines.sidecar import ENGINE_SUFFIX, Binding, EngineRecord, Profile, sidecar_of
from engines.trt.build import EngineSource, build_engine, check_can_build
from engines.trt.network import RequiredConstant
from graph_passes.interface import Port, graph_inputs, graph_outputs
from graph_passes.onnx_file import external_files, read_graph
from graph_passes.plan_names import FINGERPRINT_KEY, PLAN_KEY, check_steering_whole, metadata
from graph_passes.steering_in import edit_initializers
from graph_passes.steering_inputs import without_strength_default
from sarsteer_export.bundle.manifest import file_sha256
from sarsteer_export.staging import check_output, check_outside_bundle, nearest_folder, staged_file

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.states import Progress

CONSUMERS = {
    "add.vector": "ELEMENTWISE SUM",
    "add.nothing": "ELEMENTWISE SUM",
    "project.mean": "ELEMENTWISE SUB",
    "project.basis": "MATRIX_MULTIPLY",
    "project.basis_scaled": "MATRIX_MULTIPLY",
    "project.nothing": "ELEMENTWISE SUB",
}
"""What must compute with each constant of an edit in the parsed network; `docs/plan.md` defines the operations."""
SCALED = "ELEMENTWISE PROD"
"""What computes with a vector whose strength is an input of the graph."""
FLOATS = ("float32", "float16", "bfloat16")
UNNAMED = "?"
"""How `graph_passes.interface` shows a dimension without number and name."""


@dataclass(frozen=True)
class EngineSettings:
    """Which engines to build, and what they must be able to take.

    `engines`: backends by name. `max_batch`, `max_prompt`, `max_total`: most rows, longest pass and longest cache
    that derived profiles admit; what is None is derived from the model where there is one. `min_shapes`,
    `opt_shapes`, `max_shapes`: shapes in the grammar of trtexec instead, one text per profile; `profiles`: names
    of those profiles. `compute_capabilities`: CUDA compute capabilities to build for; the backend's own choice
    when empty.
    """

    engines: tuple[str, ...] = ()
    max_batch: int = 4
    max_prompt: int | None = None
    max_total: int | None = None
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.engines:
            find_backend(name)
        self.limits()
        for option, values in (
            ("--engine", self.engines),
            ("--compute-capability", self.compute_capabilities),
        ):
            if twice := [value for value in values if values.count(value) > 1]:
                raise InputError(f"{option} {twice[0]} is given twice")

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The rows of the backends asked for."""
        return tuple(find_backend(name) for name in self.engines)

    def limits(self, longest: int | None = None) -> ProfileLimits:
        """What derived profiles admit; `longest`: the most positions the model knows."""
        default = ProfileLimits()
        total, prompt = self.max_total, self.max_prompt
        if total is None:
            total = min(default.max_total, longest or default.max_total)
        if prompt is None:
            prompt = min(default.max_prompt, max(total, 1))  # of a total of 0 it is the total that is wrong
        return ProfileLimits(max_batch=self.max_batch, max_prompt=prompt, max_total=total)

    def decoder_profiles(
        self, inputs: tuple[Binding, ...], longest: int | None = None
    ) -> tuple[Profile, ...]:
        """The profiles of the graph that shapes may have been given for."""
        limits = self.limits(longest)
        if not (self.min_shapes or self.opt_shapes or self.max_shapes or self.profiles):
            return derive_profiles(inputs, limits)
        return explicit_profiles(
            inputs, self.min_shapes, self.opt_shapes, self.max_shapes, self.profiles, limits
        )


@dataclass(frozen=True)
class BuiltEngine:
    """An engine file with its sidecar's content."""

    path: Path
    record: EngineRecord

    def summary(self) -> str:
        """The engine in a few lines, for a terminal."""
        record = self.record
        refit = (
            f"{len(record.refit.constants)} constants"
            if record.refit.constants
            else f"no: {record.refit.reason}"
        )
        profiles = ", ".join(profile.name for profile in record.profiles)
        return "\n".join(
            [
                f"{self.path}  {record.engine['bytes'] / 1e6:.1f} MB",
                f"  {record.backend} {record.backend_version}, {record.precision}, compute capability "
                f"{', '.join(record.compute_capabilities)}",
                f"  {record.build.layers} layers in {record.build.seconds:.1f} s, peak memory "
                f"{record.build.peak_rss_bytes / 1e6:.0f} MB ({record.build.start_rss_bytes / 1e6:.0f} MB before it)",
                f"  profiles: {profiles or 'none, shapes are fixed'}",
                f"  steering: {len(record.steering)} constants found in the network, each where it must be",
                f"  refittable: {refit}",
            ]
        )


def build_engines(
    graph: str | Path,
    output: str | Path,
    settings: EngineSettings,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[BuiltEngine, ...]:
    """Build engines of one ONNX file: `output/<backend>-<version>-<target>-<precision>/<graph>.engine`.

    All appear, each with its sidecar, when the last is finished. Raises `InputError` for a bad graph or shapes,
    `UnsupportedError` for what cannot be built here, `EngineError` when TensorRT fails or steering that the graph
    holds did not reach its network.
    """
    if not settings.engines:
        raise InputError("no engine is asked for; name one with --engine")
    for backend in settings.backends:
        if backend.runtime is not Runtime.TENSORRT:
            raise InputError(f"{backend.name} runs the ONNX file itself; there is no engine to build for it")
        check_can_build(backend, settings.compute_capabilities)
    source = engine_source(Path(graph))
    profiles = settings.decoder_profiles(source.inputs)
    targets = {
        backend: Path(output)
        / label(backend, settings, source.precision)
        / f"{source.graph.stem}{ENGINE_SUFFIX}"
        for backend in settings.backends
    }
    for target in targets.values():
        for file in (target, sidecar_of(target)):
            check_outside_bundle(file)
            check_output(file, overwrite=overwrite)
        _check_space(target, source)
    with ExitStack() as stack:
        staged = {
            backend: stack.enter_context(staged_file(target, overwrite=overwrite))
            for backend, target in targets.items()
        }
        records = {
            backend: build_engine(
                source,
                file,
                backend,
                profiles,
                compute_capabilities=settings.compute_capabilities,
                progress=progress,
            )
            for backend, file in staged.items()
        }
    return tuple(BuiltEngine(target, records[backend]) for backend, target in targets.items())


def engine_source(graph: Path, content: ModelProto | None = None) -> EngineSource:
    """What there is to know of a graph before it is built: its interface, identity and steering constants.

    `content`: a graph to build in place of the file's own, sharing its external data. Raises `InputError` for a
    file that is missing, damaged, or lacks its external data or some of its steering, `UnsupportedError` for one
    that computes nothing in floating point or reads what is no tensor.
    """
    stored = read_graph(graph) if content is None else content
    check_steering_whole(stored)
    model = without_strength_default(stored)
    inputs = tuple(_binding(port) for port in graph_inputs(model))
    outputs = tuple(_binding(port) for port in graph_outputs(model))
    precision = next((port.dtype for port in (*outputs, *inputs) if port.dtype in FLOATS), None)
    if precision is None:
        raise UnsupportedError(f"{graph}: no input or output is of {', '.join(FLOATS)}; nothing to build")
    return EngineSource(
        graph=graph,
        inputs=inputs,
        outputs=outputs,
        precision=precision,
        identity=_identity(graph, model) if content is None else {"file": graph.name},
        constants=_required_constants(model),
        plan_sha256=metadata(model).get(PLAN_KEY),
        content=None if content is None and model is stored else model.SerializeToString(),
    )


def label(backend: Backend, settings: EngineSettings, precision: str) -> str:
    """The folder name of an engine: backend, version, target and precision."""
    return f"{backend.name}-{backend.version()}-{target_name(backend, settings)}-{precision}"


def target_name(backend: Backend, settings: EngineSettings) -> str:
    """What an engine is built for, such as `sm80_86_89_120`."""
    from engines.cuda_driver import cuda_driver

    capabilities = settings.compute_capabilities or backend.targets
    if not capabilities:
        capabilities = tuple(gpu.compute_capability for gpu in cuda_driver().gpus[:1])
    return (
        "sm" + "_".join(capability.replace(".", "") for capability in capabilities) if capabilities else "any"
    )


def _binding(port: Port) -> Binding:
    """A port as sidecars have it; each dimension that the graph has no name for gets one of its own."""
    kind = TensorProto.DataType.Value(port.elem_type)
    if kind == TensorProto.UNDEFINED:
        raise UnsupportedError(
            f"{port.name!r} of the graph is a sequence or an optional; engines take tensors"
        )
    dtype = (
        "bfloat16" if kind == TensorProto.BFLOAT16 else str(np.dtype(helper.tensor_dtype_to_np_dtype(kind)))
    )
    dims = (f"{port.name}[{axis}]" if dim == UNNAMED else dim for axis, dim in enumerate(port.dims))
    return fixed_dims(Binding(port.name, dtype, tuple(dims)))


def _required_constants(model: ModelProto) -> tuple[RequiredConstant, ...]:
    """The constants of every edit, in the order in which the graph's nodes read them: that in which edits act."""
    tensors = edit_initializers(model)
    readers = {
        name: node.op_type for node in reversed(model.graph.node) for name in node.input if name in tensors
    }
    read = [name for node in model.graph.node for name in node.input if name in tensors]
    ordered = dict.fromkeys([*read, *tensors])
    return tuple(_required(tensors[name], readers.get(name)) for name in ordered)


def _required(tensor: TensorProto, reader: str | None) -> RequiredConstant:
    """A steering constant and what must compute with it; scalars (what is added elsewhere) are never refitted."""
    _, _, _, op, _, key = tensor.name.split(".")
    consumer = SCALED if (key, reader) == ("vector", "Mul") else CONSUMERS.get(f"{op}.{key}")
    if consumer is None:
        raise InputError(f"the graph holds a steering constant of no known operation: {tensor.name!r}")
    values = numpy_helper.to_array(tensor)
    return RequiredConstant(tensor.name, values, consumer, refittable=values.ndim > 0)


def _identity(graph: Path, model: ModelProto) -> dict[str, Any]:
    return {
        "file": graph.name,
        "sha256": file_sha256(graph),
        "external_data": {
            file.location: file_sha256(graph.parent / file.location) for file in external_files(model)
        },
        "model_fingerprint": metadata(model).get(FINGERPRINT_KEY),
    }


def _check_space(target: Path, source: EngineSource) -> None:
    """An engine holds the weights at least once."""
    data = [source.graph.parent / name for name in source.identity["external_data"]]
    needed = sum(file.stat().st_size for file in (source.graph, *data))
    free = shutil.disk_usage(nearest_folder(target)).free
    if free < needed:
        raise InputError(
            f"{target}: the engine needs at least {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there"
        )
