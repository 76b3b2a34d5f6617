"""The chain of residual adds from the embedding to the final norm, found by walking back along their skips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.errors import SiteNotFoundError
from graph_passes.attention import AttentionFinder
from graph_passes.graph_index import describe
from graph_passes.names import is_steering
from graph_passes.residual_add import feeds_only_a_sum, skip_and_branches
from graph_passes.transparent import before_scale, source_of, uncast

if TYPE_CHECKING:
    from onnx import NodeProto

    from graph_passes.graph_index import GraphIndex


@dataclass(frozen=True)
class ResidualAdd:
    """A link of the chain: its terms, whether its branches hold the attention, and how many caches they read."""

    node: NodeProto
    output: str
    skip: str
    branches: tuple[str, ...]
    has_attention: bool
    caches: int


def find_chain(index: GraphIndex, logits: str) -> list[ResidualAdd]:
    """The residual adds from the embedding to the final norm, in order.

    Raises `SiteNotFoundError`, naming the nearest candidates, when none leads to `logits` or they have no unique end.
    """
    upstream = index.ancestors(logits)
    attention = AttentionFinder(index)
    candidates = [
        add
        for position, node in enumerate(index.nodes)
        if node.op_type == "Add"
        and upstream >> position & 1
        and (add := _residual_add(index, node, attention)) is not None
    ]
    if not candidates:
        raise SiteNotFoundError(
            f"no residual add `x + branch(x)` leads to {logits!r}; nearest candidates: "
            f"{_nearest(index, upstream)}"
        )
    everything = 0
    for add in candidates:
        everything |= index.bit(add.output)
    ends = [add for add in candidates if index.ancestors(add.output) & everything == everything]
    if len(ends) != 1:
        found = ", ".join(describe(add.node) for add in candidates[-3:])
        raise SiteNotFoundError(
            f"the residual stream has no unique end before {logits!r}; candidates: {found}"
        )
    by_output = {add.output: add for add in candidates}
    chain = [ends[0]]
    while (before := by_output.get(_sum_before(index, chain[-1].skip))) is not None:
        chain.append(before)
    return chain[::-1]


def _sum_before(index: GraphIndex, skip: str) -> str:
    """The tensor that `skip` is, seen through what a block multiplies its sum by."""
    tensor = source_of(index, skip)
    while (scaled := before_scale(index, tensor)) is not None:
        tensor = source_of(index, scaled)
    return tensor


def _residual_add(index: GraphIndex, node: NodeProto, attention: AttentionFinder) -> ResidualAdd | None:
    """Read `node` as the root of a sum `skip + branch + …`, or None when it is not a residual add."""
    if is_steering(node) or feeds_only_a_sum(index, node):
        return None
    found = skip_and_branches(index, node, uncast)  # the branch may read another cast of the same tensor
    if found is None:
        return None
    own = 0
    for branch in found.branches:
        own |= index.ancestors(branch)
    own &= ~index.ancestors(found.skip)
    return ResidualAdd(
        node,
        node.output[0],
        found.skip,
        found.branches,
        attention.is_attention(own),
        len(attention.caches_of(own)),
    )


def _nearest(index: GraphIndex, upstream: int) -> str:
    adds = [
        describe(node)
        for position, node in enumerate(index.nodes)
        if node.op_type == "Add" and upstream >> position & 1
    ]
    return ", ".join(adds[-3:]) or "none (the graph has no Add)"
