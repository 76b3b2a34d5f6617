"""From an ONNX file to TensorRT's network, and proof that given constants arrived in it and are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from calibration.errors import EngineError, InputError, SarsteerError, UnsupportedError
from engines.sidecar import NetworkConstant
from engines.trt.api import dtype_name, enum_name, log_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from engines.backends import Backend

UNKNOWN_OPS = ("INVALID_NODE", "UNSUPPORTED_NODE")
"""How the parser's error codes begin when an operator, or what a node makes of it, is not known."""
INVALID = ("INVALID_NODE", "INVALID_GRAPH")
"""Its codes for a node of a known operator that cannot be, such as a product of shapes that do not match."""
NO_DRIVER_LINE = "catchCudaError"
"""A line that every error carries along on a machine without a driver. It is never the reason."""
CARRYING = frozenset({"SHUFFLE", "CAST", "IDENTITY", "SELECT", "SQUEEZE", "UNSQUEEZE", "SLICE"})
"""Layers that hand values on without computing with them; broadcasts are among them."""


@dataclass(frozen=True)
class RequiredConstant:
    """A constant that must reach the network: its values, and the kind of layer that must compute with it.

    `consumer`: `ELEMENTWISE SUM`, `MATRIX_MULTIPLY` and the like: layer type, and operation where it has one.
    `refittable`: whether its values may be swapped in the built engine.
    """

    name: str
    values: NDArray[Any]
    consumer: str
    refittable: bool = True


@dataclass(frozen=True)
class Network:
    """A parsed network. It holds the builder and the parser too, which must outlive it."""

    backend: Backend
    builder: Any
    parser: Any
    definition: Any

    @property
    def num_layers(self) -> int:
        """Layers before optimization."""
        return int(self.definition.num_layers)


def parse(graph: Path, backend: Backend, content: bytes | None = None) -> Network:
    """Parse an ONNX file, strongly typed: every tensor keeps the type that the graph gives it.

    `content`: a serialized graph to parse in place of the file's; its external data lies beside `graph`.
    Dimensions that an exporter wrote as numeric strings become numbers. Raises `UnsupportedError` naming the
    operator and its node when the parser does not know it, `InputError` naming the node that is invalid or the file
    that is no model, `EngineError` for what else it refuses.
    """
    trt: Any = backend.load()
    log = log_of(backend)
    log.start()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if strongly_typed is None else 1 << int(strongly_typed)
    definition = builder.create_network(flags)
    parser = trt.OnnxParser(definition, log)
    parsed = parser.parse_from_file(str(graph)) if content is None else parser.parse(content, str(graph))
    if not parsed:
        raise _parse_error(graph, parser, backend, log.errors)
    network = Network(backend, builder, parser, definition)
    for tensor in _inputs(network):
        _fix_numeric_dimensions(tensor)
    return network


def check_inputs(network: Network, dtypes: dict[str, str]) -> None:
    """Raise `EngineError` unless the network reads the inputs of the graph, each in the graph's dtype."""
    seen = {tensor.name: dtype_name(tensor.dtype) for tensor in _inputs(network)}
    if seen != dtypes:
        raise EngineError(
            f"{network.backend.name} reads other inputs than the graph says: {seen}; expected {dtypes}"
        )


def require_constants(network: Network, required: Sequence[RequiredConstant]) -> tuple[NetworkConstant, ...]:
    """Find every required constant in the network and the layer that computes with it.

    Raises `EngineError` naming the first that is missing, has other values, or reaches no output through a
    layer of the kind it must.
    """
    if not required:
        return ()
    wiring = _Wiring(network)
    return tuple(wiring.find(constant) for constant in required)


class _Wiring:
    """Which layers read what, and which of them a network output depends on."""

    def __init__(self, network: Network) -> None:
        self._trt: Any = network.backend.load()
        self._backend = network.backend
        definition = network.definition
        self._layers = [definition.get_layer(number) for number in range(definition.num_layers)]
        self._readers: dict[str, list[int]] = {}
        producer: dict[str, int] = {}
        self._constants: dict[str, int] = {}
        for number, layer in enumerate(self._layers):
            if enum_name(layer.type) == "CONSTANT":
                self._constants[layer.name] = number
            for tensor in _tensors(layer.get_input, layer.num_inputs):
                self._readers.setdefault(tensor.name, []).append(number)
            for tensor in _tensors(layer.get_output, layer.num_outputs):
                producer[tensor.name] = number
        outputs = [definition.get_output(number).name for number in range(definition.num_outputs)]
        self._live = self._reached_back(producer, outputs)

    def find(self, required: RequiredConstant) -> NetworkConstant:
        number = self._constants.get(required.name)
        if number is None:
            raise self._missing(required, "the network has no such constant")
        layer = self._layers[number]
        layer.__class__ = self._trt.IConstantLayer
        shape, weights = tuple(layer.shape), layer.weights
        if shape != required.values.shape:
            raise self._missing(required, f"it has shape {shape}; expected {required.values.shape}")
        dtype, compared = self._compare(required, weights)
        for consumer in self._consumers(layer):
            if self._kind(consumer) == required.consumer:
                return NetworkConstant(
                    required.name, dtype, shape, required.consumer, consumer.name, compared
                )
        raise self._missing(
            required, f"no {required.consumer} layer on the way to an output computes with it"
        )

    def _compare(self, required: RequiredConstant, weights: Any) -> tuple[str, bool]:
        """The dtype, and whether the bindings showed the values (numpy has no bfloat16 of its own)."""
        wanted = required.values
        if isinstance(weights, np.ndarray):
            if weights.dtype != wanted.dtype or weights.tobytes() != np.ascontiguousarray(wanted).tobytes():
                raise self._missing(required, "its values are not the graph's")
            return str(weights.dtype), True
        dtype = dtype_name(weights.dtype)
        if dtype != str(wanted.dtype) or weights.size != wanted.size:
            raise self._missing(
                required, f"it holds {weights.size} {dtype}; expected {wanted.size} {wanted.dtype}"
            )
        return dtype, False

    def _consumers(self, constant: Any) -> Iterator[Any]:
        """Layers that compute with a constant, broadcasts and selections passed through."""
        waiting, seen = [constant], set()
        while waiting:
            layer = waiting.pop()
            for tensor in _tensors(layer.get_output, layer.num_outputs):
                for number in self._readers.get(tensor.name, []):
                    if number in seen or number not in self._live:
                        continue
                    seen.add(number)
                    reader = self._layers[number]
                    if enum_name(reader.type) in CARRYING:
                        waiting.append(reader)
                    else:
                        yield reader

    def _kind(self, layer: Any) -> str:
        kind = enum_name(layer.type)
        if kind != "ELEMENTWISE":
            return kind
        layer.__class__ = self._trt.IElementWiseLayer
        return f"{kind} {enum_name(layer.op)}"

    def _reached_back(self, producer: dict[str, int], tensors: list[str]) -> set[int]:
        live: set[int] = set()
        waiting = list(tensors)
        while waiting:
            number = producer.get(waiting.pop())
            if number is None or number in live:
                continue
            live.add(number)
            layer = self._layers[number]
            waiting += [tensor.name for tensor in _tensors(layer.get_input, layer.num_inputs)]
        return live

    def _missing(self, required: RequiredConstant, why: str) -> EngineError:
        return EngineError(
            f"the constant {required.name!r} did not reach the {self._backend.name} network: {why}; no engine is built"
        )


def _inputs(network: Network) -> list[Any]:
    return [network.definition.get_input(number) for number in range(network.definition.num_inputs)]


def _tensors(get: Any, count: int) -> Iterator[Any]:
    """The tensors of a layer's inputs or outputs; optional inputs that are not there are None."""
    return (tensor for tensor in map(get, range(count)) if tensor is not None)


def _fix_numeric_dimensions(tensor: Any) -> None:
    names = [tensor.get_dimension_name(axis) or "" for axis in range(len(tensor.shape))]
    tensor.shape = [
        int(name) if size < 0 and name.isdigit() else size
        for size, name in zip(tensor.shape, names, strict=True)
    ]


def _parse_error(graph: Path, parser: Any, backend: Backend, lines: list[str]) -> SarsteerError:
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    where = f"{backend.name} cannot parse {graph}"
    at_node = next((error for error in errors if error.node_operator()), None)
    if at_node is not None:
        operator, code = at_node.node_operator(), enum_name(at_node.code())
        node = f"node {at_node.node()} ({at_node.node_name()!r})"
        if code in INVALID and onnx.defs.has(operator):
            return InputError(
                f"{where}: {node}, {operator}, is invalid: {_one_line(at_node.desc())}; correct the graph, or export "
                "it again"
            )
        if code.startswith(UNKNOWN_OPS):
            return UnsupportedError(
                f"{where}: operator {operator!r} of {node} is not supported there ({_one_line(at_node.desc())}); "
                "export the decoder with ONNX's own operators"
            )
    told = (
        "; ".join(dict.fromkeys(_one_line(error.desc()) for error in errors))
        or "; ".join(lines)
        or "it does not say why"
    )
    if any(enum_name(error.code()) == "MODEL_DESERIALIZE_FAILED" for error in errors):
        return InputError(f"{where}: not a readable ONNX model; is it truncated? ({told})")
    return EngineError(f"{where}: {told}")


def _one_line(text: str) -> str:
    kept = [line.strip() for line in text.splitlines() if NO_DRIVER_LINE not in line]
    return " ".join(filter(None, kept))
