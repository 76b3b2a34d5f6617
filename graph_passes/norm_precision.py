"""In which element type the norms of a decoder graph square the residual stream.

A norm squares what it reads. Read from the graph: from every tensor of the stream (block inputs, the sums
inside a block, block outputs, also behind steering) forward through casts, selections and the subtraction
of a mean to the square, or to an operator that is a norm. Types are carried along from the stream's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
from onnx import TensorProto, helper

from graph_passes.final_norm import SELECTION_OPS
from graph_passes.fused_norms import WEIGHTS, split_fused_norms
from graph_passes.graph_index import GraphIndex, describe
from graph_passes.names import is_steering
from graph_passes.transparent import TRANSPARENT_OPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnx import ModelProto, NodeProto

    from graph_passes.residual_stream import ResidualStream

SQUARES = frozenset({"Pow", "ReduceL2", "ReduceSumSquare"})
"""Operators that square their first input; `Mul` of a tensor with itself is another."""
STASHING_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Norms whose attribute `stash_type` names the type they compute in; float32 where it is left out."""


@dataclass(frozen=True)
class NormPrecision:
    """A norm that reads the stream: where it squares which tensor, and in which ONNX element type.

    `block`: the block whose input, inner sum or (the final norm's) output the norm reads. `runtime_decides`:
    the operator does not say what it computes in, `elem_type` is its input's.
    """

    node: str
    tensor: str
    block: int
    elem_type: int
    runtime_decides: bool = False


def norm_precisions(model: ModelProto, stream: ResidualStream) -> tuple[NormPrecision, ...]:
    """Every norm that reads the stream of a decoder graph, steered or not, from block 0 to the final norm."""
    index = GraphIndex(split_fused_norms(model).graph)
    found: list[NormPrecision] = []
    for block in stream.blocks:
        found += _norms_behind(index, stream, block.input, block.index, end=block.output)
    last = stream.blocks[-1]
    found += _norms_behind(index, stream, last.output, last.index)
    return tuple(found)


def narrowest_type(elem_types: Iterable[int]) -> int:
    """The element type whose largest finite value is smallest."""
    return min(elem_types, key=largest_finite)


def largest_finite(elem_type: int) -> float:
    """The largest finite value of a floating-point element type."""
    finfo: Any = ml_dtypes.finfo  # numpy's does not know bfloat16
    return float(finfo(helper.tensor_dtype_to_np_dtype(elem_type)).max)


def type_name(elem_type: int) -> str:
    """The name of an element type as numpy writes it."""
    return str(helper.tensor_dtype_to_np_dtype(elem_type))


def _norms_behind(
    index: GraphIndex, stream: ResidualStream, start: str, block: int, end: str | None = None
) -> Iterator[NormPrecision]:
    """The norms that read the stream between the tensors `start` and `end`."""
    waiting, seen = [(start, stream.elem_type_of(start))], {start, end}
    while waiting:
        tensor, elem_type = waiting.pop(0)
        for position in dict.fromkeys(index.consumers[tensor]):
            node = index.nodes[position]
            if _squares(node, tensor):
                yield NormPrecision(describe(node), tensor, block, elem_type)
            elif node.op_type in STASHING_NORMS and node.input[0] == tensor:
                computed_in = _attribute(node, "stash_type", TensorProto.FLOAT)
                yield NormPrecision(describe(node), tensor, block, computed_in)
            elif node.op_type in WEIGHTS and node.input[0] == tensor:
                yield NormPrecision(describe(node), tensor, block, elem_type, runtime_decides=True)
            elif _carries_stream(index, node, tensor) and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append((node.output[0], _attribute(node, "to", elem_type)))


def _squares(node: NodeProto, tensor: str) -> bool:
    if node.op_type == "Mul":
        return node.input[0] == node.input[1]
    return node.op_type in SQUARES and node.input[0] == tensor


def _carries_stream(index: GraphIndex, node: NodeProto, tensor: str) -> bool:
    """Whether a reader of the stream hands it on: cast, selected, edited, centred or added to a branch."""
    if node.op_type == "Add":
        return is_steering(node) or all(index.is_computed(name) for name in node.input)
    return node.input[0] == tensor and node.op_type in TRANSPARENT_OPS | SELECTION_OPS | {"Sub"}


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
