"""What a tensor is computed from, as a digest that does not depend on names: two tensors of equal digests are
computed alike.

Operators count with their domain and attributes (those at their defaults left out), constants with their type, shape
and values to the bit, graph inputs with their names. Operands of commutative operators have no order, and what changes
nothing is seen through: `Identity`, and a cast of a graph input to its own type. So a graph is read as it computes,
whatever an optimiser or a person called its nodes, merged or stored elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from graph_passes.graph_index import subgraphs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

COMMUTATIVE_OPS = frozenset({"Add", "And", "Equal", "Max", "Min", "Mul", "Or"})
DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})
SHAPE_OPS = frozenset({"Shape", "Size"})
STREAM_SHAPE = "shape of the stream"
MAX_DEPTH = 200
"""Steering is a few dozen operators deep; what lies deeper is told apart by its name."""
MAX_CONSTANT_BYTES = 1 << 28
"""A larger constant is no steering, is not read, and is told apart by its name."""


@dataclass(frozen=True)
class Constants:
    """The constants of a graph by name; those in external data are read from `folder` when they are asked for."""

    tensors: Mapping[str, TensorProto]
    folder: Path | None = None

    def values(self, name: str) -> NDArray[Any] | None:
        """The values of a constant; None where they are absent, damaged or larger than steering ever is."""
        tensor = self.tensors[name]
        try:
            if not uses_external_data(tensor):
                return numpy_helper.to_array(tensor)
            return self._external(tensor, self.folder) if self.folder else None
        except (OSError, TypeError, ValueError, KeyError):
            return None

    def _external(self, tensor: TensorProto, folder: Path) -> NDArray[Any] | None:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        size = math.prod(tensor.dims) * dtype.itemsize
        info = ExternalDataInfo(tensor)
        if size > MAX_CONSTANT_BYTES or info.length not in (None, size):
            return None
        with (folder / info.location).open("rb") as file:
            file.seek(info.offset or 0)
            raw = file.read(size)
        loaded = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        return numpy_helper.to_array(loaded)


@dataclass(frozen=True)
class Leaves:
    """Where expressions end: tensors with a digest of their own, and tensors that have the shape of the stream."""

    own: Mapping[str, str] = field(default_factory=dict)
    stream: Collection[str] = ()


class Expressions:
    """The digests of the tensors of one graph.

    `inputs`: element types of the graph inputs by name; a name that is also a constant is a default, and counts
    as an input. `opset`: version of the default operators.
    """

    def __init__(
        self, nodes: Collection[NodeProto], constants: Constants, inputs: Mapping[str, int], opset: int
    ) -> None:
        self._producer = {name: node for node in nodes for name in node.output if name}
        self._constants, self._inputs, self._opset = constants, inputs, opset

    def root(self, tensor: str) -> str:
        """The tensor that `tensor` is, seen through what changes no value."""
        while (node := self._producer.get(tensor)) is not None and self._is_transparent(node):
            tensor = node.input[0]
        return tensor

    def of(self, tensor: str, leaves: Leaves) -> str:
        """The digest of a tensor."""
        return self._digest(tensor, leaves, {}, 0)

    def constants_of(self, tensor: str, leaves: Leaves) -> list[NDArray[Any]]:
        """The constants of at least one dimension, floating point, that a tensor is computed from."""
        found, seen, stack = [], set[str](), [tensor]
        while stack and len(seen) < MAX_DEPTH:
            name = self.root(stack.pop())
            if name in seen or name in leaves.own:
                continue
            seen.add(name)
            node = self._producer.get(name)
            if node is not None and node.op_type != "Constant":
                stack += [] if reads_shape_only(node) else [each for each in node.input if each]
            elif (values := self._values(name, node)) is not None and values.ndim and _is_float(values):
                found.append(values)
        return found

    def _is_transparent(self, node: NodeProto) -> bool:
        if node.domain not in DEFAULT_DOMAINS or not node.input:
            return False
        if node.op_type == "Cast":
            to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
            return node.input[0] in self._inputs and self._inputs[node.input[0]] == to
        return node.op_type == "Identity" or (node.op_type == "Add" and self._adds_nothing(node))

    def _adds_nothing(self, node: NodeProto) -> bool:
        """Whether a node adds a tensor of −0 in a computed shape to its first operand: x + (−0) is x for every x."""
        filled = self._producer.get(node.input[1]) if len(node.input) == 2 else None
        if filled is None or filled.op_type != "ConstantOfShape" or filled.domain not in DEFAULT_DOMAINS:
            return False
        values = [value for value in map(_tensor_attribute, filled.attribute) if value is not None]
        return len(values) == 1 and bool(np.all((values[0] == 0) & np.signbit(values[0])))

    def _digest(self, tensor: str, leaves: Leaves, known: dict[str, str], depth: int) -> str:
        tensor = self.root(tensor)
        if tensor in leaves.own:
            return leaves.own[tensor]
        if tensor not in known:
            known[tensor] = self._computed(tensor, leaves, known, depth)
        return known[tensor]

    def _computed(self, tensor: str, leaves: Leaves, known: dict[str, str], depth: int) -> str:
        if tensor in self._inputs:
            return _hash("input", tensor)
        node = self._producer.get(tensor)
        if node is None or node.op_type == "Constant":
            values = self._values(tensor, node)
            return _hash("unread", tensor) if values is None else digest_of(values)
        if depth > MAX_DEPTH or subgraphs(node):
            return _hash("unread", tensor)
        if reads_shape_only(node):
            return _hash(*self._operator(node, tensor), self._shape(node.input[0], leaves))
        operands = [self._digest(name, leaves, known, depth + 1) if name else "" for name in node.input]
        if node.op_type in COMMUTATIVE_OPS and node.domain in DEFAULT_DOMAINS:
            operands.sort()
        return _hash(*self._operator(node, tensor), *operands)

    def _shape(self, tensor: str, leaves: Leaves) -> str:
        root = self.root(tensor)
        if tensor in leaves.stream or root in leaves.stream:
            return STREAM_SHAPE
        return _hash("input" if root in self._inputs else "unread", root)

    def _operator(self, node: NodeProto, tensor: str) -> Iterator[str]:
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        yield from (domain, node.op_type, str(list(node.output).index(tensor)))
        defaults = _default_attributes(node.op_type, domain, self._opset)
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            value = _attribute(attribute)
            if defaults.get(attribute.name) != value:
                yield f"{attribute.name}={value}"

    def _values(self, name: str, node: NodeProto | None) -> NDArray[Any] | None:
        if node is None:
            return self._constants.values(name) if name in self._constants.tensors else None
        if len(node.attribute) != 1:
            return None
        attribute = node.attribute[0]
        if attribute.name == "value":
            return _tensor_attribute(attribute)
        if attribute.name in ("value_int", "value_ints"):
            return np.array(onnx.helper.get_attribute_value(attribute), dtype=np.int64)
        if attribute.name in ("value_float", "value_floats"):
            return np.array(onnx.helper.get_attribute_value(attribute), dtype=np.float32)
        return None


def reads_shape_only(node: NodeProto) -> bool:
    """Whether the values of what a node reads do not matter to it."""
    return node.op_type in SHAPE_OPS and node.domain in DEFAULT_DOMAINS


def digest_of(values: NDArray[Any]) -> str:
    """The digest of a constant: type, shape and values to the bit."""
    return _hash(
        "constant", str(values.dtype), str(values.shape), hashlib.sha256(values.tobytes()).hexdigest()
    )


def _attribute(attribute: AttributeProto) -> str:
    if (values := _tensor_attribute(attribute)) is not None:
        return digest_of(values)
    if attribute.type == AttributeProto.TENSOR:
        return attribute.SerializeToString(deterministic=True).hex()
    return str(onnx.helper.get_attribute_value(attribute))


def _tensor_attribute(attribute: AttributeProto) -> NDArray[Any] | None:
    """The values of a tensor attribute; None for other kinds, and where they are damaged or lie elsewhere."""
    if attribute.type != AttributeProto.TENSOR or uses_external_data(attribute.t):
        return None
    try:
        return numpy_helper.to_array(attribute.t)
    except (TypeError, ValueError, KeyError):
        return None


def _default_attributes(op_type: str, domain: str, opset: int) -> dict[str, str]:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    defaults = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    return {name: _attribute(value) for name, value in defaults.items() if value.name}


def _is_float(values: NDArray[Any]) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating)) or values.dtype.name == "bfloat16"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part};".encode())
    return digest.hexdigest()
