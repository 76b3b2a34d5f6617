"""Find the residual stream of a decoder graph from its structure.

The stream is the chain of residual adds `x + branch(x)` that ends at the final norm. A residual add is
recognised by what it is, not by its name: one operand (the skip) is an ancestor of every other operand
(the branches) through a matrix product. Walking back from the logits along the skips gives the chain; an
add whose branch holds the attention starts a block. Module scopes that exporters leave on nodes are used
only to cross-check the result.

Dimensions: B batch, S sequence of this forward pass, D width of the stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.errors import SiteNotFoundError, UnsupportedError
from calibration.plan import Site
from graph_passes.attention import AttentionFinder
from graph_passes.attention_mask import find_attention_mask
from graph_passes.fused_norms import split_fused_norms
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, describe, subgraphs
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX, is_steering
from graph_passes.scopes import Scope, decoder_scopes, inlined
from graph_passes.tensor_types import elem_type_and_width, recorded_types
from graph_passes.transparent import (
    TRANSPARENT_OPS,
    before_scale,
    behind_quantisation,
    behind_scale,
    handed_on,
    in_float,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx import GraphProto, ModelProto, NodeProto

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
LOGIT_OPS = frozenset({"Add", "Div", "Mul", "Tanh"})
"""What may stand between the head's matrix product and the logits: a bias, a scale, a soft cap."""
SELECTION_OPS = frozenset({"Gather", "GatherND", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""What may stand on either side of the head: a graph that computes the logits of some positions only."""

BY_HAND = (
    "if you know the tensors, say them by hand: `inspect --sites FILE` writes what to fill in, "
    "`patch --sites FILE` takes it"
)


@dataclass(frozen=True)
class Block:
    """One decoder block: the stream tensors (B, S, D) before and after it, and its residual adds by name."""

    index: int
    input: str
    output: str
    adds: tuple[str, ...]


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream of a decoder: its blocks, width D and ONNX element type.

    `final_norm_output` is the final norm of every position, or None where there is none. `attention_mask` is
    the graph input [batch, past + sequence], or None. `other_types` lists stream tensors of another element
    type, as an embedding in float32 before a float16 stream.
    """

    blocks: tuple[Block, ...]
    final_norm_output: str | None
    hidden_size: int
    elem_type: int
    attention_mask: str | None
    other_types: tuple[tuple[str, int], ...] = ()

    def elem_type_of(self, tensor: str) -> int:
        """The ONNX element type of a stream tensor."""
        return dict(self.other_types).get(tensor, self.elem_type)

    def tensor(self, site: Site, layer: int) -> str:
        """The stream tensor at a site. Raises `SiteNotFoundError` when the graph has no such site."""
        if site is Site.BLOCK_INPUT:
            return self.blocks[layer].input
        if site is Site.BLOCK_OUTPUT:
            return self.blocks[layer].output
        if self.final_norm_output is None:
            raise SiteNotFoundError(
                "this graph has no final norm over every position between its last block and the logits"
            )
        return self.final_norm_output


@dataclass(frozen=True)
class _ResidualAdd:
    node: NodeProto
    output: str
    skip: str
    branches: tuple[str, ...]
    has_attention: bool
    caches: int


def find_residual_stream(model: ModelProto) -> ResidualStream:
    """Find the blocks and sites of a decoder graph that has no bodies; functions of the file are seen through.

    Sums that are fused with the norms behind them are found too, under the names that `split_fused_norms`
    gives them. Raises `SiteNotFoundError` when there is no unique answer, with the nearest candidates.
    """
    _refuse_unsupported(model.graph)
    model = split_fused_norms(inlined(model) if model.functions else model)
    index = GraphIndex(model.graph)
    adds = _chain(index, _logits(index))
    blocks = _blocks(index, adds)
    _cross_check_scopes(index, blocks)
    outputs = [block.output for block in blocks]
    elem_type, hidden_size = elem_type_and_width(model, blocks[0].input, outputs)
    final_norm_output = _final_norm_output(index, outputs[-1], elem_type)
    tensors = [blocks[0].input, *outputs, *([final_norm_output] if final_norm_output else [])]
    types = recorded_types(model, tensors)
    return ResidualStream(
        blocks=blocks,
        final_norm_output=final_norm_output,
        hidden_size=hidden_size,
        elem_type=elem_type,
        attention_mask=find_attention_mask(
            index, blocks[0].input, [branch for add in adds if add.has_attention for branch in add.branches]
        ),
        other_types=tuple(
            (name, types[name].tensor_type.elem_type)
            for name in tensors
            if name in types and types[name].tensor_type.elem_type != elem_type
        ),
    )


def find_residual_streams(model: ModelProto) -> dict[Scope, ResidualStream]:
    """The residual stream of every graph of a file that computes the decoder; the bodies of a merged one agree.

    Raises what `find_residual_stream` does, naming the body, and `SiteNotFoundError` for bodies that differ.
    """
    scopes = decoder_scopes(model)
    streams = {}
    for scope in scopes:
        try:
            streams[scope] = find_residual_stream(scope.view(model))
        except SiteNotFoundError as error:
            where = f"{scope}: " if str(scope) else ""
            raise SiteNotFoundError(f"{where}{error}; {BY_HAND}") from None
    shapes = {(len(stream.blocks), stream.hidden_size, stream.elem_type) for stream in streams.values()}
    if len(shapes) > 1:
        found = "; ".join(
            f"{scope}: {len(stream.blocks)} blocks of width {stream.hidden_size}"
            for scope, stream in streams.items()
        )
        raise SiteNotFoundError(f"the bodies of the merged decoder differ: {found}; {BY_HAND}")
    return streams


def _refuse_unsupported(graph: GraphProto) -> None:
    for node in graph.node:
        bodies = subgraphs(node)
        if any(child.op_type in MATMUL_OPS for body in bodies for child in body.node):
            raise UnsupportedError(
                f"{describe(node)} holds bodies that compute the decoder; expected a flat graph, or one `If` "
                "around whole decoders"
            )


def _logits(index: GraphIndex) -> str:
    outputs = [value.name for value in index.graph.output]
    return "logits" if "logits" in outputs else outputs[0]


def _chain(index: GraphIndex, logits: str) -> list[_ResidualAdd]:
    """The residual adds from the embedding to the final norm, in order."""
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
    tensor = _source(index, skip)
    while (scaled := before_scale(index, tensor)) is not None:
        tensor = _source(index, scaled)
    return tensor


def _residual_add(index: GraphIndex, node: NodeProto, attention: AttentionFinder) -> _ResidualAdd | None:
    """Read `node` as the root of a sum `skip + branch + …`, or None when it is not a residual add."""
    if is_steering(node) or _feeds_only_a_sum(index, node):
        return None
    terms = list(_terms(index, node))
    for skip in terms:
        branches = [term for term in terms if term != skip]
        start = index.bit(_uncast(index, skip))  # the branch may read another cast of the same tensor
        reached = [index.ancestors_through_matmul(branch) & start for branch in branches]
        if branches and all(reached):
            own = 0
            for branch in branches:
                own |= index.ancestors(branch)
            own &= ~index.ancestors(skip)
            return _ResidualAdd(
                node,
                node.output[0],
                skip,
                tuple(branches),
                attention.is_attention(own),
                len(attention.caches_of(own)),
            )
    return None


def _terms(index: GraphIndex, node: NodeProto) -> Iterable[str]:
    """The terms of a sum of sums, as in `x + attention + mlp` of parallel blocks; constants left out."""
    for name in node.input:
        producer = index.producer_of(_unquantised(index, name))
        if producer is not None and producer.op_type == "Add" and _feeds_only_a_sum(index, producer):
            yield from _terms(index, producer)
        elif index.is_computed(name):
            yield name


def _feeds_only_a_sum(index: GraphIndex, node: NodeProto) -> bool:
    consumers = index.consumers[behind_quantisation(index, node.output[0])]
    return (
        len(consumers) == 1
        and index.nodes[consumers[0]].op_type == "Add"
        and not is_steering(index.nodes[consumers[0]])
    )


def _source(index: GraphIndex, tensor: str) -> str:
    """The tensor that `tensor` is, seen through casts, Q/DQ pairs and steering already in the graph."""
    while (node := index.producer_of(tensor)) is not None:
        before = node.input[0] if is_steering(node) else handed_on(index, node)
        if before is None:
            break
        tensor = before
    return tensor


def _stream_start(index: GraphIndex, skip: str) -> str:
    """The tensor that all of block 0 reads: `skip`, or what it was cast from where the branch reads that."""
    tensor = skip
    while (node := index.producer_of(tensor)) is not None:
        if not is_steering(node):
            readers = [index.nodes[position] for position in index.consumers[node.input[0]] if node.input]
            others = [reader for reader in readers if reader is not node and reader.op_type != "Shape"]
            if node.op_type not in TRANSPARENT_OPS or not any(not is_steering(other) for other in others):
                break
        tensor = node.input[0]
    return _steered(index, tensor)


def _uncast(index: GraphIndex, tensor: str) -> str:
    while (node := index.producer_of(tensor)) is not None:
        if (before := handed_on(index, node)) is None:
            break
        tensor = before
    return tensor


def _unquantised(index: GraphIndex, tensor: str) -> str:
    """What `tensor` was before its Q/DQ pair."""
    node = index.producer_of(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return tensor
    return handed_on(index, node) or tensor


def _steered(index: GraphIndex, tensor: str) -> str:
    """The tensor that consumers of the stream see where it is `tensor`: that behind its steering, if any."""
    if tensor.startswith(UNSTEERED_PREFIX):
        return tensor.removeprefix(UNSTEERED_PREFIX)
    return STEERED_PREFIX + tensor if STEERED_PREFIX + tensor in index.producer else tensor


def _blocks(index: GraphIndex, adds: list[_ResidualAdd]) -> tuple[Block, ...]:
    starts = [position for position, add in enumerate(adds) if add.has_attention]
    if not starts or starts[0] != 0:
        raise SiteNotFoundError(
            f"the residual stream starts with {describe(adds[0].node)}, whose branch holds no attention; "
            "expected the attention of block 0"
        )
    groups = [adds[start:end] for start, end in zip(starts, [*starts[1:], len(adds)], strict=True)]
    scaled = [behind_scale(index, members[-1].output) for members in groups[:-1]]
    are_scaled = bool(scaled) and all(scaled)  # the last block's is told from what stands before the norm
    blocks: list[Block] = []
    for number, members in enumerate(groups):
        end = members[-1].output
        end = (behind_scale(index, end) if are_scaled else None) or end
        blocks.append(
            Block(
                index=number,
                input=blocks[-1].output if blocks else _stream_start(index, members[0].skip),
                output=_steered(index, behind_quantisation(index, end)),
                adds=tuple(describe(add.node) for add in members),
            )
        )
    _check_caches(index, groups, blocks)
    return tuple(blocks)


def _check_caches(index: GraphIndex, groups: list[list[_ResidualAdd]], blocks: list[Block]) -> None:
    """Raise unless every block that reads caches of its own has two; a block may attend to an earlier one's.

    Where positions are numbered by the length of some block's cache, everything depends on that one: it counts as
    block 0's, and its own block, which may be block 0 itself, has one less.
    """
    caches = len(AttentionFinder(index).caches)
    own = [sum(add.caches for add in members) for members in groups]
    owners = sum(count > 0 for count in own)
    if caches != 2 * owners or sum(own) > caches or max(own[1:], default=0) > 2 or (caches and own[0] == 0):
        raise SiteNotFoundError(
            f"found {len(blocks)} decoder blocks on the residual stream, but the graph has {caches} KV-cache "
            f"inputs; expected {2 * len(blocks)}; the blocks end at {_ends(blocks)}"
        )


def _ends(blocks: list[Block]) -> str:
    """The nodes that blocks end with, the middle of many left out."""
    names = [block.adds[-1] for block in blocks]
    return ", ".join(names if len(names) <= 4 else [*names[:2], "…", *names[-2:]])


def _cross_check_scopes(index: GraphIndex, blocks: tuple[Block, ...]) -> None:
    """Raise when module scopes say that a block's output belongs to another layer than structure says."""
    for block in blocks:
        producer = index.producer_of(_source(index, block.output))
        scopes = (
            [entry.value for entry in producer.metadata_props if entry.key == SCOPES_KEY] if producer else []
        )
        layers = re.findall(r"\.(?:layers|blocks|h)\.(\d+)'", scopes[0]) if scopes else []
        if producer is not None and layers and int(layers[-1]) != block.index:
            raise SiteNotFoundError(
                f"structure says {describe(producer)} ends block {block.index}; its module scope says "
                f"layer {layers[-1]}"
            )


def _final_norm_output(index: GraphIndex, stream_end: str, elem_type: int) -> str | None:
    """The norm of every position that the head reads or, in a graph without a head, that it gives out."""
    stream = _source(index, stream_end)
    end = index.bit(stream)
    tensor, head_passed = _norm_by_head(index, stream, elem_type)
    if not head_passed:
        tensor = _logits(index)
        if _holds(index, _source(index, tensor), stream, MATMUL_OPS):
            return None
    if _source(index, tensor) == stream:
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
    tensor, head_passed = _logits(index), False
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


def _nearest(index: GraphIndex, upstream: int) -> str:
    adds = [
        describe(node)
        for position, node in enumerate(index.nodes)
        if node.op_type == "Add" and upstream >> position & 1
    ]
    return ", ".join(adds[-3:]) or "none (the graph has no Add)"
