"""What a residual add is: a sum `x + branch(x)`, told by what its terms are computed from, not by its name.

One term, the skip, is where every other one, the branches, comes from by way of a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.names import is_steering
from graph_passes.transparent import behind_quantisation, unquantised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from onnx import NodeProto

    from graph_passes.graph_index import GraphIndex


@dataclass(frozen=True)
class SkipAndBranches:
    """The terms of a residual add."""

    skip: str
    branches: tuple[str, ...]


def skip_and_branches(
    index: GraphIndex, node: NodeProto, origin_of: Callable[[GraphIndex, str], str]
) -> SkipAndBranches | None:
    """The terms of `node` as those of a residual add; None where it is not one.

    `origin_of`: the tensor of which a skip is another form, which the branches may read instead.
    """
    terms = terms_of(index, node)
    for skip in terms:
        branches = tuple(term for term in terms if term != skip)
        if branches and come_from(index, branches, origin_of(index, skip)):
            return SkipAndBranches(skip, branches)
    return None


def come_from(index: GraphIndex, branches: Iterable[str], origin: str) -> bool:
    """Whether every branch is computed from `origin` by way of a matrix product."""
    start = index.bit(origin)
    return all(index.ancestors_through_matmul(branch) & start for branch in branches)


def terms_of(index: GraphIndex, node: NodeProto) -> tuple[str, ...]:
    """What `node` joins, each once; a sum of sums, as `x + attention + mlp` of parallel blocks, is taken apart.

    Constants are left out.
    """
    return tuple(dict.fromkeys(_terms(index, node)))


def feeds_only_a_sum(index: GraphIndex, node: NodeProto) -> bool:
    """Whether nothing but another sum, which is no edit, reads what `node` computes."""
    consumers = index.consumers[behind_quantisation(index, node.output[0])]
    return (
        len(consumers) == 1
        and index.nodes[consumers[0]].op_type == "Add"
        and not is_steering(index.nodes[consumers[0]])
    )


def _terms(index: GraphIndex, node: NodeProto) -> Iterator[str]:
    for name in node.input:
        producer = index.producer_of(unquantised(index, name))
        if producer is not None and producer.op_type == "Add" and feeds_only_a_sum(index, producer):
            yield from _terms(index, producer)
        elif index.is_computed(name):
            yield name
