"""Where the final norm ends: what the head reads or, in a graph without a head, what the graph gives out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_passes.graph_index import MATMUL_OPS
from graph_passes.names import is_steering
from graph_passes.transparent import TRANSPARENT_OPS, handed_on, in_float, source_of

if TYPE_CHECKING:
    from onnx import NodeProto

    from graph_passes.graph_index import GraphIndex

LOGIT_OPS = frozenset({"Add", "Div", "Mul", "Tanh"})
"""What may stand between the head's matrix product and the logits: a bias, a scale, a soft cap."""
SELECTION_OPS = frozenset({"Gather", "GatherND", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""What may stand on either side of the head: a graph that computes the logits of some positions only."""


def logits_of(index: GraphIndex) -> str:
    """The output of that name, or the first one."""
    outputs = [value.name for value in index.graph.output]
    return "logits" if "logits" in outputs else outputs[0]


def find_final_norm(index: GraphIndex, stream_end: str, elem_type: int) -> str | None:
    """The norm of every position that the head reads or, in a graph without a head, that it gives out."""
    stream = source_of(index, stream_end)
    end = index.bit(stream)
    tensor, head_passed = _norm_by_head(index, stream, elem_type)
    if not head_passed:
        tensor = logits_of(index)
        if _holds(index, source_of(index, tensor), stream, MATMUL_OPS):
            return None
    if source_of(index, tensor) == stream:
        return None
    norm = index.ancestors(tensor) & ~index.ancestors(stream)
    selects = (
        norm >> position & 1
        and node.op_type in SELECTION_OPS - {"Reshape"}
        and not is_steering(node)
        and index.ancestors(node.input[0]) & end
        for position, node in enumerate(index.nodes)
    )
    return None if any(selects) else tensor


def _norm_by_head(index: GraphIndex, stream: str, elem_type: int) -> tuple[str, bool]:
    """Walk back from the logits over the head to what it reads; where that ends, and whether there was a head."""
    end = index.bit(stream)
    tensor, head_passed = logits_of(index), False
    while (node := index.producer_of(tensor)) is not None and not is_steering(node):
        is_head = node.op_type in MATMUL_OPS and not head_passed
        if node.op_type == "Cast" and head_passed and _cast_to(node) == elem_type:
            break  # a norm computed in float32 ends with the cast to the stream's type
        if not head_passed and node.op_type == "DequantizeLinear" and (before := handed_on(index, node)):
            tensor = before
            continue
        passable = SELECTION_OPS | TRANSPARENT_OPS | (frozenset() if head_passed else LOGIT_OPS)
        if not is_head and node.op_type not in passable:
            break
        sources = [name for name in node.input if name and index.ancestors(name) & end]
        if not sources:
            break
        if not head_passed and not is_head:  # the scales of a quantised head depend on the norm too
            sources = [name for name in sources if _holds(index, name, stream, MATMUL_OPS)] or sources
        tensor, head_passed = sources[0], head_passed or is_head
        tensor = in_float(index, tensor) if is_head else tensor
    return tensor, head_passed


def _holds(index: GraphIndex, tensor: str, before: str, op_types: frozenset[str]) -> bool:
    """Whether `tensor` is computed from `before` by way of some operator, steering aside."""
    between = index.ancestors(tensor) & ~index.ancestors(before)
    return any(
        node.op_type in op_types and not is_steering(node)
        for position, node in enumerate(index.nodes)
        if between >> position & 1
    )


def _cast_to(node: NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")
