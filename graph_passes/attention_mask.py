"""Which graph input is the attention mask, found by what is computed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

    from graph_passes.graph_index import GraphIndex

MASK_NAME = "attention_mask"
MASK_TYPES = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL})
ANGLE_OPS = frozenset({"Cos", "Sin", "RotaryEmbedding", "Shape", "Size"})
"""What positions, but no mask, come into attention by; and what reads no values at all."""
LOOKUP_OPS = frozenset({"Gather", "GatherElements", "GatherND"})


def find_attention_mask(index: GraphIndex, start: str, attention: list[str]) -> str | None:
    """The graph input [batch, past + sequence] that says which positions are attended to, or None.

    It is of rank 2 and of integers or bools; the embeddings `start` do not depend on it; `attention`, branches of
    the residual stream, do, and not as on position ids, by way of an angle or as the index of a lookup. Its name
    only decides between several such inputs, or speaks for one where nothing reads any.
    """
    ranked = [value for value in index.graph.input if value.name in index.inputs and _may_be_mask(value)]
    named = [value.name for value in ranked if _is_named(value.name)]
    typed = [value.name for value in ranked if value.type.tensor_type.elem_type in MASK_TYPES]
    found = [
        name
        for name in typed
        if not index.ancestors(start) & index.bit(name) and _reaches(index, name, attention)
    ]
    if len(found) == 1:
        return found[0]
    for candidates in ([name for name in found if name in named], named if not found else []):
        exact = [name for name in candidates if name == MASK_NAME] or candidates
        if len(exact) == 1:
            return exact[0]
    return None


def _may_be_mask(value: ValueInfoProto) -> bool:
    """Whether an input is of rank 2; one without a shape may be by its name."""
    if value.type.tensor_type.HasField("shape"):
        return len(value.type.tensor_type.shape.dim) == 2
    return value.name == MASK_NAME


def _is_named(name: str) -> bool:
    """Whether an input is called as masks are, whatever an exporter puts before it with a dot."""
    return name.rpartition(".")[2] == MASK_NAME


def _reaches(index: GraphIndex, name: str, attention: list[str]) -> bool:
    """Whether values of an input come into attention as a mask's do."""
    reached = {name}
    for node in index.nodes:
        if node.op_type not in ANGLE_OPS and not reached.isdisjoint(_valued_inputs(node)):
            reached.update(node.output)
    return not reached.isdisjoint(attention)


def _valued_inputs(node: NodeProto) -> list[str]:
    return list(node.input[:1] if node.op_type in LOOKUP_OPS else node.input)
