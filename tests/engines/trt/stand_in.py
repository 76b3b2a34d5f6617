"""The runtime half of TensorRT's Python API over ONNX Runtime and host memory, for machines without a GPU.

What a runner does is judged here as strictly as by the real library, and in places more so: shapes outside of the
chosen profile, addresses that are missing, null or shared, a context without a profile, and the default stream are
refused with a line in the log. Work is only enqueued; it reads and writes the addresses when the stream is
synchronized, so that a result that is read too early is wrong here too. It says nothing about numbers on a GPU.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from engines.sidecar import Profile

__version__ = "1.0.stand-in"
MAGIC = b"stand-in engine\n"
Shape = tuple[int, ...]


class ILogger:
    """Base of the logger that callers give."""

    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def __init__(self) -> None: ...


TensorLocation = Enum("TensorLocation", "DEVICE HOST")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
DataType = Enum("DataType", "FLOAT HALF BF16 INT64 INT32 INT8 UINT8 BOOL")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)

TYPES = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.BFLOAT16: DataType.BF16,
    TensorProto.INT64: DataType.INT64,
    TensorProto.INT32: DataType.INT32,
    TensorProto.BOOL: DataType.BOOL,
}


def serialized(model: onnx.ModelProto, profiles: Sequence[Profile], **faults: Any) -> bytes:
    """An engine of the stand-in: a graph with all its weights, its profiles, and what should be wrong with it.

    Faults: `host` (a tensor said to lie on the host), `fails` (runs are refused), `capturable` (False). `refit`: the
    names of weights that may be swapped; `missing`: one that TensorRT wants along with them.
    """
    ranges = [
        {name: [shape.min, shape.opt, shape.max] for name, shape in profile.shapes.items()}
        for profile in profiles
    ]
    header = json.dumps({"profiles": ranges, **faults}).encode()
    return b"".join([MAGIC, header, b"\n", model.SerializeToString()])


class HostStream:
    """What stands for `engines.trt.device.CudaStream`; everything that was made in a test is in `made`."""

    made: ClassVar[list[HostStream]] = []

    def __init__(self, device: str) -> None:
        self.handle = 4096 + len(self.made)
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.captures = 0
        self.is_active = False
        self.made.append(self)

    @contextmanager
    def active(self) -> Iterator[None]:
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self.captured = []
        try:
            work()
        finally:
            self.captured = None
        self.captures += 1
        return lambda: self.queue.extend(graph)


class Runtime:
    """Opens engines; the last one is kept in `opened` for tests to look at."""

    opened: ClassVar[Engine]

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, content: Any) -> Engine | None:
        blob = bytes(content)
        if not blob.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "deserialize: magic tag\n  does not match")
            return None
        header, _, graph = blob[len(MAGIC) :].partition(b"\n")
        Runtime.opened = Engine(json.loads(header), onnx.load_from_string(graph), self._logger)
        return Runtime.opened


SerializationFlag = Enum("SerializationFlag", "EXCLUDE_WEIGHTS EXCLUDE_LEAN_RUNTIME INCLUDE_REFIT")


class SerializationConfig:
    """Flags; weights are left out of a refitted engine unless told otherwise."""

    def __init__(self) -> None:
        self.flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag: Any) -> bool:
        self.flags.add(flag)
        return True

    def clear_flag(self, flag: Any) -> bool:
        self.flags.discard(flag)
        return True


class Weights:
    """Weights by address, as the real constructor takes what numpy has no type for. Nothing is copied."""

    def __init__(self, dtype: Any, address: int, count: int) -> None:
        self.dtype, self.address, self.count = dtype, address, count


class Refitter:
    """Swaps weights of an engine when all that are wanted were given; reads them only then."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.header.get("refit", []))

    def get_missing_weights(self) -> list[str]:
        wanted = self._engine.header.get("missing")
        return [wanted] if wanted and self._given else []

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        if name not in self.get_all_weights():
            return self._refuse(f"{name} is not refittable")
        tensor = self._engine.initializers[name]
        if TYPES[tensor.data_type] is not weights.dtype or weights.count != int(np.prod(tensor.dims)):
            return self._refuse(f"{name}: {weights.dtype} x {weights.count} is not what it was built with")
        self._given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        if not self._given or self.get_missing_weights() or self._engine.header.get("fails"):
            return self._refuse("refit failed")
        for name, weights in self._given.items():
            tensor = self._engine.initializers[name]
            tensor.raw_data = ctypes.string_at(weights.address, len(tensor.raw_data))
        self._engine.session = None
        return True

    def _refuse(self, why: str) -> bool:
        self._logger.log(ILogger.Severity.ERROR, why)
        return False


class Engine:
    """The part of `ICudaEngine` that running needs."""

    def __init__(self, header: dict[str, Any], model: onnx.ModelProto, logger: Any) -> None:
        self.model = model
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.session: onnxruntime.InferenceSession | None = None
        self.header, self.logger = header, logger
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = max(1, len(header["profiles"]))
        self.contexts: list[Context] = []

    def create_serialization_config(self) -> SerializationConfig:
        return SerializationConfig()

    def serialize_with_config(self, config: SerializationConfig) -> bytes | None:
        if SerializationFlag.EXCLUDE_WEIGHTS in config.flags:
            return MAGIC + b"stripped"
        header = dict(self.header)
        if SerializationFlag.INCLUDE_REFIT not in config.flags:
            header.pop("refit", None)
        return b"".join([MAGIC, json.dumps(header).encode(), b"\n", self.model.SerializeToString()])

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with the graph as it is now. One in bfloat16 can be refitted, and not be run."""
        if self.session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        names = list(self.outputs)
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[(self.inputs | self.outputs)[name].type.tensor_type.elem_type]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.HOST if name == self.header.get("host") else TensorLocation.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return bool(name == self.header.get("shape"))

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append(Context(self, config))
        return self.contexts[-1]

    def _dims(self, name: str) -> list[int]:
        """Dimensions of an input, -1 for dynamic ones; numbers that exporters wrote as names are numbers."""
        dims = self.inputs[name].type.tensor_type.shape.dim
        return [int(dim.dim_param) if dim.dim_param.isdigit() else dim.dim_value or -1 for dim in dims]


class Context:
    """The part of `IExecutionContext` that running needs; what it was told is kept for tests to look at."""

    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.profile, self.profile_stream = -1, 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[dict[str, int]] = []
        self._output_shapes: dict[tuple[Shape, ...], dict[str, Shape]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self.engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {index}")
        self.profile, self.profile_stream = index, stream
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if self.profile < 0:
            return self._refuse("no profile is chosen")
        dims = self.engine._dims(name)
        ranges = self.engine.header["profiles"]
        low, high = dims, dims
        if ranges and name in ranges[self.profile]:
            low, _, high = ranges[self.profile][name]
        fits = len(shape) == len(dims) and all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True))
        if not fits:
            return self._refuse(f"{name} {shape} is not in {low} .. {high} of profile {self.profile}")
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self.engine.inputs:
            return self.shapes.get(name, tuple(self.engine._dims(name)))
        if set(self.shapes) != set(self.engine.inputs):
            return tuple(-1 for _ in self.engine.outputs[name].type.tensor_type.shape.dim)
        key = tuple(self.shapes.values())
        if key not in self._output_shapes:
            zeros = {name: np.zeros(shape, self._dtype(name)) for name, shape in self.shapes.items()}
            self._output_shapes[key] = {name: array.shape for name, array in self._compute(zeros).items()}
        return self._output_shapes[key][name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.inputs | self.engine.outputs:
            return self._refuse(f"there is no tensor {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        on = next((made for made in HostStream.made if made.handle == stream), None)
        if on is None or not on.is_active:
            return self._refuse(f"stream {stream} is not one that is in use")
        if self.profile_stream != stream:
            return self._refuse("the profile was chosen on another stream")
        names = [*self.engine.inputs, *self.engine.outputs]
        if missing := [name for name in self.engine.inputs if name not in self.shapes]:
            return self._refuse(f"the shape of {missing[0]} is not set")
        if missing := [name for name in names if not self.addresses.get(name)]:
            return self._refuse(f"{missing[0]} is bound to nullptr")
        if len({self.addresses[name] for name in names}) < len(names):
            return self._refuse("two tensors lie at one address")
        if self.engine.header.get("fails"):
            return self._refuse("the card has caught fire")
        if on.captured is not None and not self.engine.header.get("capturable", True):
            return self._refuse("a layer cannot be captured")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.runs.append(addresses)
        on.enqueue(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        feeds = {}
        for name, shape in shapes.items():
            dtype = self._dtype(name)
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = np.frombuffer(ctypes.string_at(addresses[name], size), dtype).reshape(shape)
        for name, array in self._compute(feeds).items():
            content = np.ascontiguousarray(array).tobytes()
            ctypes.memmove(addresses[name], content, len(content))

    def _compute(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.engine._run(feeds)

    def _dtype(self, name: str) -> np.dtype[Any]:
        return helper.tensor_dtype_to_np_dtype(self.engine.inputs[name].type.tensor_type.elem_type)

    def _refuse(self, why: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, why)
        return False
