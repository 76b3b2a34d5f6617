"""Whether anything that the residual stream feeds is reached past a tensor of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_passes.attention import cache_inputs
from graph_passes.expressions import reads_shape_only
from graph_passes.graph_index import describe
from graph_passes.transparent import QDQ_OPS, TRANSPARENT_OPS, before_scale

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from onnx import NodeProto

    from graph_passes.residual_stream import ResidualStream
    from graph_passes.steps import SteppedGraph

SUM_OPS = frozenset({"Add"}) | TRANSPARENT_OPS | QDQ_OPS


def past(graph: SteppedGraph, stream: ResidualStream, natural: str, end: str, depth: int) -> str | None:
    """What reads the stream past `end`, in words, or None.

    `natural`: the stream tensor before its edits; whatever depends on its values must do so by way of `end`. And
    whatever is computed behind it must not depend on the tokens in any other way, as by computing the stream again.
    `depth`: the number of the block that reads it.
    """
    blocked = _same(graph, end)
    start = _same(graph, natural)
    if not start & blocked and (reader := _forward(graph, start, blocked)) is not None:
        return reader
    return _backward(graph, _outputs_behind(graph, stream, depth), blocked | _shared(graph, stream, depth))


def sums_between(graph: SteppedGraph, starts: Collection[str], end: str) -> set[str]:
    """The sums on the way from tensors of the stream to a later one that leads over additions alone.

    The later one may be a multiple of the last sum, by a constant.
    """
    sums_end = end
    while (scaled := before_scale(graph.index, sums_end)) is not None:
        sums_end = scaled
    ahead, stack = set(starts), list(starts)
    while stack:
        for position in graph.index.consumers[stack.pop()]:
            node = graph.index.nodes[position]
            if node.op_type in SUM_OPS and node.output[0] not in ahead:
                ahead.add(node.output[0])
                stack.append(node.output[0])
    behind, stack = {end, sums_end}, [sums_end]
    while stack:
        tensor = stack.pop()
        made_by = graph.index.producer_of(tensor)
        if made_by is not None and made_by.op_type in SUM_OPS and tensor not in starts:
            stack += [name for name in made_by.input if name not in behind]
            behind.update(made_by.input)
    return ahead & behind


def odd_sums(graph: SteppedGraph, tensors: Collection[str], sums: Collection[str]) -> list[NodeProto]:
    """Additions to tensors of the stream that are neither steps nor among its `sums`."""
    found = []
    for tensor in sorted(tensors):
        for position in graph.index.consumers[tensor]:
            node = graph.index.nodes[position]
            odd = (
                node.op_type == "Add" and node.output[0] not in sums and node.output[0] not in graph.by_output
            )
            if odd and graph.expressions.root(node.output[0]) == node.output[0]:
                found.append(node)
    return found


def _same(graph: SteppedGraph, tensor: str) -> set[str]:
    """The tensor under every name that it has."""
    root = graph.expressions.root(tensor)
    return graph.names.get(root, {root})


def _shared(graph: SteppedGraph, stream: ResidualStream, depth: int) -> set[str]:
    """Keys and values that blocks before `depth` give to the cache, where later blocks have none of their own."""
    caches = cache_inputs(graph.index)
    if not caches or len(caches) >= 2 * len(stream.blocks):
        return set()
    behind = set(_outputs_behind(graph, stream, depth))
    outputs = [value.name for value in graph.index.graph.output]
    given = [name for name in outputs if name not in behind and _depends(graph, name, caches)]
    return set[str]().union(*(_same(graph, name) for name in given))


def _depends(graph: SteppedGraph, tensor: str, inputs: Sequence[str]) -> bool:
    return any(graph.values.get(tensor, 0) & graph.bits[name] for name in inputs)


def _forward(graph: SteppedGraph, start: set[str], blocked: set[str]) -> str | None:
    """The first reader on a way from `start` to an output of the graph that avoids `blocked`."""
    outputs = {value.name for value in graph.index.graph.output}
    if found := start & outputs:
        return f"the graph gives out the unsteered tensor as {sorted(found)[0]!r}"
    needed = _upstream(graph, outputs - blocked, blocked)[0]
    for name in sorted(start):
        for position in graph.index.consumers[name]:
            node = graph.index.nodes[position]
            if reads_shape_only(node) or blocked.issuperset(filter(None, node.output)):
                continue
            if needed >> position & 1:
                return f"{describe(node)} reads the unsteered tensor"
    return None


def _backward(graph: SteppedGraph, outputs: Sequence[str], blocked: set[str]) -> str | None:
    """An output that depends on the tokens by another way than by `blocked`, in words."""
    if not _reads_tokens(graph, outputs, blocked):
        return None
    odd = next(output for output in outputs if _reads_tokens(graph, [output], blocked))
    return f"{odd!r} depends on the tokens by a way past the steered tensor"


def _reads_tokens(graph: SteppedGraph, outputs: Iterable[str], blocked: set[str]) -> bool:
    reached = _upstream(graph, outputs, blocked)[1]
    return any(name in reached for name in graph.content)


def _upstream(graph: SteppedGraph, tensors: Iterable[str], blocked: set[str]) -> tuple[int, set[str]]:
    """The nodes (as bits) and the graph inputs that the values of tensors depend on, not by way of `blocked`."""
    nodes, names, stack = 0, set[str](), [name for name in tensors if name not in blocked]
    while stack:
        name = stack.pop()
        if name in names:
            continue
        names.add(name)
        position = graph.index.producer.get(name)
        if position is None or nodes >> position & 1:
            continue
        nodes |= 1 << position
        stack += [each for each in graph.sources[position] if each not in blocked]
    return nodes, names


def _outputs_behind(graph: SteppedGraph, stream: ResidualStream, depth: int) -> list[str]:
    """The logits, and what blocks from `depth` on give to the cache."""
    caches = 0
    for name in cache_inputs(graph.index):
        caches |= graph.bits[name]
    before = stream.blocks[depth].input if depth < len(stream.blocks) else None
    outputs = [value.name for value in graph.index.graph.output]
    behind = ["logits" if "logits" in outputs else outputs[0]]
    if before is None:
        return behind
    earlier = graph.values.get(before, 0) & caches
    return behind + [
        name for name in outputs if name not in behind and graph.values.get(name, 0) & caches & ~earlier
    ]
