"""The cheapest exact form of each edit, and what it costs.

Exact: at strength 0 the outputs are those of the unedited graph bit for bit, and the sum is taken where the eager
model takes it or, for the two bias forms, in float32 from constants. Half-precision streams round the sum of
their terms in the order in which they are added; the bias forms are for float32 streams alone.
Dimensions: B batch, S sequence of a pass, D width, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from calibration.plan import Add, Edit, Positions
from graph_passes.fused_norms import bias_slot, is_fused, sum_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import NodeProto

    from graph_passes.graph_index import GraphIndex


class Form(str, Enum):
    """How an edit stands in a graph."""

    NORM_BIAS = "unused bias of the fused norm"
    PROJECTION_BIAS = "added to the bias of the last projection"
    ADD = "one addition"
    SELECTED_ADD = "one addition, selected by a mask"
    PROJECTION = "two thin products"
    SELECTED_PROJECTION = "two thin products, selected by a mask"
    GATHERED_PROJECTION = "two thin products of the one gathered position"


@dataclass(frozen=True)
class Cost:
    """What an edit adds to one pass of one row: floating-point operations, and bytes that nodes read and write."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Choice:
    """The form of one edit, where it acts, and why no cheaper one."""

    form: Form
    node: NodeProto | None
    why: str


def choose(
    edit: Edit, *, alone: bool, baked: bool, is_float32: bool, index: GraphIndex, anchor: str
) -> Choice:
    """The cheapest exact form of `edit` at the stream tensor `anchor`.

    `alone`: it is the only edit there. `baked`: its strength is a constant. `index`: of the unedited graph.
    """
    if not isinstance(edit, Add):
        if edit.positions == Positions.LAST:
            return Choice(Form.GATHERED_PROJECTION, None, "a row is edited at one position")
        form = Form.PROJECTION if edit.positions == Positions.ALL and baked else Form.SELECTED_PROJECTION
        return Choice(form, None, "the change depends on the stream")
    if edit.positions != Positions.ALL:
        return Choice(Form.SELECTED_ADD, None, "a bias would act at every position")
    if not baked:
        return Choice(Form.SELECTED_ADD, None, "its strength is an input")
    if not alone:
        return Choice(Form.ADD, None, "other edits act on the same tensor, in order")
    if not is_float32:
        return Choice(Form.ADD, None, "in half precision a bias would be rounded elsewhere")
    if (node := _fused_norm(index, anchor)) is not None:
        return Choice(Form.NORM_BIAS, node, "the fused norm adds it after both summands")
    if (node := _biased_projection(index, anchor)) is not None:
        return Choice(Form.PROJECTION_BIAS, node, "both biases are constants, added when the graph is loaded")
    return Choice(Form.ADD, None, "no bias is added to this tensor")


def cost(
    edit: Edit, form: Form, *, hidden_size: int, elem_bytes: int, sequence: int, baked: bool = True
) -> Cost:
    """What an edit in some form adds to a pass of S positions, batch 1, when every node runs by itself.

    `baked`: its strength is a constant; one that is fed takes another product. Casts, which half-precision streams
    need around what is computed in float32, are left out, and what edits share.
    """
    D, S = hidden_size, sequence
    vector, stream = D * elem_bytes, S * D * elem_bytes
    if form is Form.PROJECTION_BIAS:
        return Cost(0, 0)  # two constants, added when the graph is loaded
    if form is Form.NORM_BIAS:
        return Cost(S * D, vector)
    if isinstance(edit, Add):
        select = S + vector + elem_bytes + stream
        scale = Cost(0, 0) if baked else Cost(D, 4 + 8 * D)
        moved = 3 * stream + select if form is Form.SELECTED_ADD else 2 * stream + vector
        return Cost(S * D + scale.flops, moved + scale.bytes)
    gathered = form is Form.GATHERED_PROJECTION
    R, K = 1 if gathered else S, edit.basis.shape[1]
    rows, coordinates, basis = 4 * R * D, 4 * R * K, 4 * D * K
    centre = 0 if edit.mean is None else 2 * rows + 4 * D
    products = rows + basis + coordinates + coordinates + basis + rows
    gather = 8 + stream + R * vector if gathered else 0  # a row's index is 8 bytes
    select = 0 if form is Form.PROJECTION else S + R * vector + elem_bytes + stream
    flops = (0 if edit.mean is None else R * D) + 4 * R * D * K + S * D
    scale = Cost(0, 0) if baked else Cost(R * D, 4 + 2 * rows)
    return Cost(flops + scale.flops, gather + centre + products + select + 3 * stream + scale.bytes)


def _fused_norm(index: GraphIndex, anchor: str) -> NodeProto | None:
    """The fused norm whose sum is `anchor` and whose bias is free."""
    for node in index.nodes:
        if is_fused(node) and sum_name(node) == anchor:
            return node if len(node.input) == bias_slot(node) else None
    return None


def _biased_projection(index: GraphIndex, anchor: str) -> NodeProto | None:
    """The node `product + bias` whose result is a summand of `anchor` and nothing else; its bias is a constant (D,)."""
    for summand in _summands(index, anchor):
        node = index.producer_of(summand)
        if node is not None and len(index.consumers[summand]) == 1 and _adds_vector(index, node):
            return node
    return None


def _summands(index: GraphIndex, total: str) -> Iterator[str]:
    """What a tensor is the sum of, through sums that nothing else reads."""
    node = index.producer_of(total)
    if node is None or node.op_type != "Add" or _adds_vector(index, node):
        return
    for name in node.input:
        yield name
        if len(index.consumers[name]) == 1:
            yield from _summands(index, name)


def _adds_vector(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a node adds a constant vector to something computed."""
    constants = [name for name in node.input if not index.is_computed(name)]
    return node.op_type == "Add" and len(constants) == 1 and _is_vector(index, constants[0])


def bias_of(index: GraphIndex, node: NodeProto) -> str:
    """The constant summand of an addition."""
    return next(name for name in node.input if not index.is_computed(name))


def _is_vector(index: GraphIndex, name: str) -> bool:
    return name in index.initializers and len(index.initializers[name].dims) == 1
