"""What one decoder block is made of: its residual adds, their branches, and what each branch computes.

Derived from the graph alone, by operators and wiring. A branch is read in three parts: what stands before its
first matrix product, from there to its last one, and behind that; norms are told in the outer parts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.attention import cache_inputs
from graph_passes.fused_norms import fused_sums, split_fused_norms
from graph_passes.graph_index import MATMUL_OPS, GraphIndex
from graph_passes.names import is_steering
from graph_passes.residual_add import skip_and_branches, terms_of
from graph_passes.transparent import FORM_OPS, TRANSPARENT_OPS, reshaped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto, NodeProto

    from graph_passes.residual_add import SkipAndBranches
    from graph_passes.residual_stream import ResidualStream

REDUCTIONS = frozenset({"ReduceMean", "ReduceL2", "ReduceSumSquare"})
ACTIVATIONS = frozenset(
    {
        "BiasGelu",
        "Erf",
        "FastGelu",
        "Gelu",
        "QuickGelu",
        "Relu",
        "Sigmoid",
        "Silu",
        "Softmax",
        "Swish",
        "Tanh",
    }
)


@dataclass(frozen=True)
class Part:
    """A stretch of a branch: `norm`, `attention`, `mlp`; its name, and what it was recognised by."""

    kind: str
    title: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class ResidualSum:
    """A residual add: its operator and name, and its branches. `shared`: a norm that all branches read."""

    op: str
    name: str
    shared: Part | None
    branches: tuple[tuple[Part, ...], ...]


def block_sums(model: ModelProto, stream: ResidualStream, layer: int) -> tuple[ResidualSum, ...]:
    """The residual adds of a block in order; none where the wiring between its input and output is not understood."""
    index = GraphIndex(split_fused_norms(model).graph)
    origins = fused_sums(model)
    block = stream.blocks[layer]
    start, tensor = _source(index, block.input), _source(index, block.output)
    sums: list[ResidualSum] = []
    while tensor != start:
        node = index.producer_of(tensor)
        if node is None:
            return ()
        found, terms = skip_and_branches(index, node, reshaped), terms_of(index, node)
        if found is not None:
            sums.append(_sum(index, origins.get(node.output[0], node), found))
        elif len(terms) != 1:
            return ()
        tensor = _source(index, terms[0] if found is None else found.skip)
    return tuple(reversed(sums))


def final_norm(model: ModelProto, stream: ResidualStream) -> Part | None:
    """The norm behind the last block, where every position passes it."""
    if stream.final_norm_output is None:
        return None
    index = GraphIndex(split_fused_norms(model).graph)
    end = _source(index, stream.blocks[-1].output)
    output = _source(index, stream.final_norm_output)
    nodes = _members(index, output, index.ancestors(end), end)
    return _norm(nodes) or Part("norm", "final norm", (_listed(nodes),))


def _source(index: GraphIndex, tensor: str) -> str:
    while (node := index.producer_of(tensor)) is not None and (
        node.op_type in TRANSPARENT_OPS or is_steering(node)
    ):
        tensor = node.input[0]
    return tensor


def _sum(index: GraphIndex, node: NodeProto, found: SkipAndBranches) -> ResidualSum:
    before, start = index.ancestors(found.skip), reshaped(index, found.skip)
    branches = [_Branch(index, term, before, start) for term in found.branches]
    common = branches[0].before if len(branches) > 1 else []
    shared = _norm(common) if all(branch.before == common for branch in branches) else None
    return ResidualSum(
        op=node.op_type,
        name=node.name or node.output[0],
        shared=shared,
        branches=tuple(branch.parts(without_norm=shared is not None) for branch in branches),
    )


class _Branch:
    """The nodes of a branch that depend on the stream, in its three parts."""

    def __init__(self, index: GraphIndex, output: str, before: int, start: str) -> None:
        self.index = index
        self.own = index.ancestors(output) & ~before
        members = _members(index, output, before, start)
        self.products = [node for node in members if _is_product(node)]
        self.bits = sum(index.bit(node.output[0]) for node in self.products)
        leading = 0
        for node in self.products:
            leading |= index.ancestors(node.output[0])
        self.before: list[NodeProto] = []
        self.core: list[NodeProto] = []
        self.behind: list[NodeProto] = []
        for node in members:
            if not index.ancestors(node.output[0]) & self.bits:
                self.before.append(node)
            else:
                (self.core if leading & index.bit(node.output[0]) else self.behind).append(node)

    def parts(self, *, without_norm: bool) -> tuple[Part, ...]:
        first = None if without_norm else _norm(self.before)
        parts = (first, self._core(), _norm(self.behind))
        return tuple(part for part in parts if part is not None)

    def _core(self) -> Part:
        fused = [node.op_type for node in self.products if "Attention" in node.op_type]
        matmuls = [node for node in self.products if node.op_type in MATMUL_OPS]
        of_activations = [node for node in matmuls if self._multiplies_activations(node)]
        weights = Counter(node.op_type for node in matmuls if node not in of_activations)
        details = [f"{count} weight products ({op})" for op, count in weights.items()]
        activations = [node.op_type for node in (*self.core, *self.behind) if node.op_type in ACTIVATIONS]
        if not fused and not self._attends(of_activations):
            details += [", ".join(dict.fromkeys(activations))] if activations else []
            return Part("mlp", "MLP", tuple(details))
        found = list(dict.fromkeys(fused)) or [f"{len(of_activations)} attention products"]
        found += ["Softmax"] if "Softmax" in activations else []
        found += ["KV cache"] if self._reads_cache() else []
        return Part("attention", "attention", (*details, ", ".join(found)))

    def _multiplies_activations(self, node: NodeProto) -> bool:
        return all(self.index.is_computed(name) for name in node.input[:2])

    def _reads_cache(self) -> bool:
        return any(self.own & self.index.bit(name) for name in cache_inputs(self.index))

    def _attends(self, products: Sequence[NodeProto]) -> bool:
        scores = sum(self.index.bit(node.output[0]) for node in products)
        return self._reads_cache() or any(
            node.op_type == "Softmax" and self.index.ancestors(node.output[0]) & scores for node in self.core
        )


def _is_product(node: NodeProto) -> bool:
    return node.op_type in MATMUL_OPS or "Attention" in node.op_type


def _members(index: GraphIndex, output: str, before: int, start: str) -> list[NodeProto]:
    """The decoder's nodes that carry values of `start` on to `output` and that `before` has not.

    What depends on the shape of `start` alone, as masks and positions do, is no part of a branch.
    """
    own = index.ancestors(output) & ~before
    members, carriers = [], {start}
    for position, node in enumerate(index.nodes):
        inside = bool(own >> position & 1)
        if not node.output or not node.output[0]:
            continue
        if not (inside or node.op_type in FORM_OPS) or carriers.isdisjoint(node.input):
            continue
        if node.op_type != "Shape":
            carriers.update(node.output)
            if inside and not is_steering(node):
                members.append(node)
    return members


def _norm(nodes: Sequence[NodeProto]) -> Part | None:
    """The norm in a stretch of nodes, one operator or many, or None."""
    whole = [node.op_type for node in nodes if "Normalization" in node.op_type]
    if whole:
        is_rms = "Simplified" in whole[0] or "RMS" in whole[0]
        return Part("norm", "RMSNorm" if is_rms else "LayerNorm", (whole[0],))
    ops = [node.op_type for node in nodes]
    if not REDUCTIONS & set(ops):
        return None
    return Part("norm", "LayerNorm" if "Sub" in ops else "RMSNorm", (_listed(nodes),))


def _listed(nodes: Sequence[NodeProto]) -> str:
    ops = [node.op_type for node in nodes if node.op_type not in FORM_OPS]
    while ops[:1] == ["Add"]:  # the bias of the product before a norm that stands behind a branch
        ops = ops[1:]
    runs = [(op, len(list(run))) for op, run in itertools.groupby(ops)]
    return ", ".join(op if count == 1 else f"{count} {op}" for op, count in runs)
