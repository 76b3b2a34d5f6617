"""Find the residual stream of a decoder graph from its structure.

The stream is the chain of residual adds `x + branch(x)` that ends at the final norm. What a residual add is says
`residual_add.py`; walking back from the logits along the skips gives the chain (`residual_chain.py`), and what
the head reads is the norm (`final_norm.py`). An add whose branch holds the attention starts a block. Module
scopes that exporters leave on nodes are used only to cross-check the result.

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
from graph_passes.final_norm import find_final_norm, logits_of
from graph_passes.fused_norms import split_fused_norms
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, describe, subgraphs
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX, is_steering
from graph_passes.residual_chain import find_chain
from graph_passes.scopes import Scope, decoder_scopes, inlined
from graph_passes.tensor_types import elem_type_and_width, recorded_types
from graph_passes.transparent import TRANSPARENT_OPS, behind_quantisation, behind_scale, source_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

    from graph_passes.residual_chain import ResidualAdd

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
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


def find_residual_stream(model: ModelProto) -> ResidualStream:
    """Find the blocks and sites of a decoder graph that has no bodies; functions of the file are seen through.

    Sums that are fused with the norms behind them are found too, under the names that `split_fused_norms`
    gives them. Raises `SiteNotFoundError` when there is no unique answer, with the nearest candidates.
    """
    _refuse_unsupported(model.graph)
    model = split_fused_norms(inlined(model) if model.functions else model)
    index = GraphIndex(model.graph)
    adds = find_chain(index, logits_of(index))
    blocks = _blocks(index, adds)
    _cross_check_scopes(index, blocks)
    outputs = [block.output for block in blocks]
    elem_type, hidden_size = elem_type_and_width(model, blocks[0].input, outputs)
    final_norm_output = find_final_norm(index, outputs[-1], elem_type)
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


def _steered(index: GraphIndex, tensor: str) -> str:
    """The tensor that consumers of the stream see where it is `tensor`: that behind its steering, if any."""
    if tensor.startswith(UNSTEERED_PREFIX):
        return tensor.removeprefix(UNSTEERED_PREFIX)
    return STEERED_PREFIX + tensor if STEERED_PREFIX + tensor in index.producer else tensor


def _blocks(index: GraphIndex, adds: list[ResidualAdd]) -> tuple[Block, ...]:
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


def _check_caches(index: GraphIndex, groups: list[list[ResidualAdd]], blocks: list[Block]) -> None:
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
        producer = index.producer_of(source_of(index, block.output))
        scopes = (
            [entry.value for entry in producer.metadata_props if entry.key == SCOPES_KEY] if producer else []
        )
        layers = re.findall(r"\.(?:layers|blocks|h)\.(\d+)'", scopes[0]) if scopes else []
        if producer is not None and layers and int(layers[-1]) != block.index:
            raise SiteNotFoundError(
                f"structure says {describe(producer)} ends block {block.index}; its module scope says "
                f"layer {layers[-1]}"
            )
