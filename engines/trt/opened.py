"""An engine of TensorRT or TensorRT-RTX, opened on a GPU: its checks, execution contexts and bindings."""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from calibration.errors import EngineError, InputError, SarsteerError, UnsupportedError
from engines.cuda_driver import cuda_driver
from engines.input_roles import fixed_dims
from engines.opening import check_can_run
from engines.profiles import tightest
from engines.runner import TensorSpec
from engines.sidecar import EngineRecord, sidecar_of
from engines.trt.api import dtype_name, enum_name, log_of
from engines.trt.device import TORCH_DTYPES, CudaStream, address, allocate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType, TracebackType

    from typing_extensions import Self

    from engines.backends import Backend
    from engines.sidecar import Binding


def check_torch_cuda(backend: Backend) -> None:
    """Raise `UnsupportedError` when PyTorch, whose memory engines run in, cannot reach a GPU that the driver sees."""
    if torch.cuda.is_available():
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    raise UnsupportedError(
        f"{backend.name} runs in memory of PyTorch, and PyTorch {torch.__version__}, built {built}, cannot reach the "
        f"GPU; the driver serves CUDA {cuda_driver().cuda_version}: install a build of torch for that version"
    )


class OpenEngine:
    """An engine file and its sidecar; between enter and exit also its weights and contexts on the GPU.

    `inputs` and `outputs` are known from the start, `record` is the sidecar. Raises `InputError` when the sidecar
    is missing or malformed. Entering raises `UnsupportedError` where the engine cannot run, `InputError` when it is
    of another backend or version or is not the file that the sidecar describes, and `EngineError`, with TensorRT's
    own lines, when TensorRT refuses it.
    """

    _fixed_shapes: ClassVar[bool]
    _contexts: dict[int, Any]
    _engine: Any
    _runtime: Any

    def __init__(self, engine: str | Path, *, backend: Backend, device: str = "cuda") -> None:
        self._path = Path(engine)
        self._backend = backend
        self._device = device
        self.record = EngineRecord.read(sidecar_of(self._path))
        self.inputs: tuple[TensorSpec, ...] = tuple(self._spec(binding) for binding in self.record.inputs)
        self.outputs: tuple[TensorSpec, ...] = tuple(self._spec(binding) for binding in self.record.outputs)
        self._close()

    def __enter__(self) -> Self:
        check_can_run(self._backend)
        self._check_file()
        self._trt = self._backend.load()
        self._log = log_of(self._backend)
        try:
            self._stream = _open_stream(self._device)
        except RuntimeError as error:
            raise UnsupportedError(f"device {self._device!r} cannot be used: {_first_line(error)}") from error
        with self._working():
            runtime = self._trt.Runtime(self._log)
            with (
                self._path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                engine = runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise self._cannot_open()
            self._check_interface(engine)
        self._runtime, self._engine = runtime, engine
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _cannot_open(self) -> SarsteerError:
        """Why TensorRT opens nothing: no GPU here is among those the engine serves, or what its log says."""
        serves, gpus = self.record.compute_capabilities, cuda_driver().gpus
        here = ", ".join(f"{gpu.name} {gpu.compute_capability}" for gpu in gpus) or "no GPU"
        failure = self._failure(f"cannot open {self._path} (it serves {', '.join(serves)}; here: {here})")
        if gpus and not any(gpu.compute_capability in serves for gpu in gpus):
            return UnsupportedError(str(failure))
        return failure

    def _close(self) -> None:
        """Let go of everything on the device, contexts before the engine and the engine before the runtime."""
        self._contexts = {}
        self._engine = None
        self._runtime = None

    def _spec(self, binding: Binding) -> TensorSpec:
        if binding.dtype not in TORCH_DTYPES:
            raise InputError(
                f"{sidecar_of(self._path)}: {binding.name!r} is {binding.dtype}; "
                f"expected one of {', '.join(TORCH_DTYPES)}"
            )
        return TensorSpec(binding.name, np.dtype(binding.dtype), fixed_dims(binding).dims)

    def _check_file(self) -> None:
        built, here = (
            f"{self.record.backend} {self.record.backend_version}",
            f"{self._backend.name} {self._backend.version()}",
        )
        if built != here:
            raise InputError(f"{self._path} was built with {built}; here is {here}: build it again with that")
        try:
            size = self._path.stat().st_size
        except OSError as error:
            raise InputError(f"{self._path}: the engine cannot be read ({error.strerror})") from error
        if size != self.record.engine["bytes"]:
            raise InputError(
                f"{self._path} has {size} bytes; its sidecar says {self.record.engine['bytes']}: build it again"
            )

    def _check_interface(self, engine: Any) -> None:
        """Raise `InputError` unless the sidecar says what the engine reads, computes and was tuned for."""
        trt = self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for name in names:
            on_host = engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            if on_host or engine.is_shape_inference_io(name):
                raise UnsupportedError(
                    f"{name!r} of {self._path} is a tensor of shapes, which cannot be fed here"
                )
        seen = {
            (enum_name(engine.get_tensor_mode(name)), name, dtype_name(engine.get_tensor_dtype(name)))
            for name in names
        }
        said = {("INPUT", spec.name, spec.dtype.name) for spec in self.inputs}
        said |= {("OUTPUT", spec.name, spec.dtype.name) for spec in self.outputs}
        if seen != said:
            differs = "; ".join(" ".join(entry) for entry in sorted(seen ^ said))
            raise InputError(f"{self._path} and its sidecar disagree on {differs}: build it again")
        profiles = max(1, len(self.record.profiles))
        if engine.num_optimization_profiles != profiles:
            raise InputError(
                f"{self._path} has {engine.num_optimization_profiles} profiles; its sidecar says {profiles}: "
                "build it again"
            )

    def _require_open(self) -> None:
        if self._engine is None:
            raise RuntimeError("the runner is closed; use it inside a `with` block")

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Order what PyTorch does on the runner's stream; what CUDA reports becomes an `EngineError`."""
        self._log.start()
        try:
            with self._stream.active():
                yield
        except RuntimeError as error:
            raise EngineError(
                f"{self._backend.name} failed on {self._device}: {_first_line(error)}"
            ) from error

    def _bind(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        """The context whose profile fits the inputs best, told where they lie, and its outputs, yet to be filled.

        Raises `InputError` when no profile admits the shapes.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        context = self._context(tightest(self.record.profiles, shapes))
        for name, shape in shapes.items():
            self._demand(context.set_input_shape(name, shape), f"refuses shape {shape} of input {name!r}")
        outputs = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            self._demand(
                min(shape, default=0) >= 0, f"does not know the shape of output {spec.name!r}: {shape}"
            )
            outputs[spec.name] = allocate(shape, spec.dtype, self._device)
        for name, tensor in {**inputs, **outputs}.items():
            self._demand(
                context.set_tensor_address(name, address(tensor)), f"refuses the address of {name!r}"
            )
        return context, outputs

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            trt: ModuleType = self._trt
            config = self._engine.create_runtime_config()
            strategy = (
                trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            )  # memory for one profile, not the largest
            config.set_execution_context_allocation_strategy(strategy)
            if compiles_at_run_time(trt):
                _configure_rtx(trt, config, fixed_shapes=self._fixed_shapes)
            context = self._engine.create_execution_context(config)
            self._demand(context is not None, f"cannot make a context for profile {profile}")
            chosen = context.set_optimization_profile_async(profile, self._stream.handle)
            self._demand(chosen, f"refuses profile {profile}")
            self._contexts[profile] = context
        return self._contexts[profile]

    def _enqueue(self, context: Any) -> None:
        self._demand(context.execute_async_v3(self._stream.handle), "failed to run the engine")

    def _demand(self, done: bool, otherwise: str) -> None:
        if not done:
            raise self._failure(otherwise)

    def _failure(self, what: str) -> EngineError:
        lines = "; ".join(self._log.errors) or "it logged no reason"
        return EngineError(f"{self._backend.name} {self._backend.version()} {what}: {lines}")


def _open_stream(device: str) -> CudaStream:
    return CudaStream(device)


def compiles_at_run_time(trt: ModuleType) -> bool:
    """Whether this is TensorRT-RTX, which compiles kernels on the machine that runs the engine."""
    return hasattr(trt, "CudaGraphStrategy")


def _configure_rtx(trt: Any, config: Any, *, fixed_shapes: bool) -> None:
    """Where shapes are fixed: kernels and a CUDA graph made for them. Where they grow: kernels that serve them all.

    Left to itself TensorRT-RTX replaces kernels by others, made in the background for a shape, when they are ready;
    what a decoder computes at a step would then depend on how fast that was.
    """
    kernels = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if fixed_shapes else kernels.NONE
    if fixed_shapes:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
