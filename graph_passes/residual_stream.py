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

import onnx
from onnx import ModelProto, NodeProto, TypeProto

from calibration.errors import SiteNotFoundError, UnsupportedError
from calibration.plan import Site
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, describe

if TYPE_CHECKING:
    from collections.abc import Iterable

STEERING_PREFIX = "sarsteer."
"""Names of inserted nodes, tensors and constants start with this."""
UNSTEERED_PREFIX = STEERING_PREFIX + "unsteered."
"""A steered tensor keeps its name; what its producer computes is renamed to this and the name."""
STEERED_PREFIX = STEERING_PREFIX + "steered."
"""A steered graph input cannot be renamed; its consumers read this and the name."""
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
TRANSPARENT_OPS = frozenset({"Cast", "Identity"})
HEAD_OPS = frozenset(
    {"Add", "Cast", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Tanh"}
)
"""What may stand between the final norm and the logits beside the head's matrix product."""


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

    `final_norm_output` is what the head reads, or None where there is no final norm. `attention_mask` is the
    graph input [batch, past + sequence], or None.
    """

    blocks: tuple[Block, ...]
    final_norm_output: str | None
    hidden_size: int
    elem_type: int
    attention_mask: str | None

    def tensor(self, site: Site, layer: int) -> str:
        """The stream tensor at a site. Raises `SiteNotFoundError` when the graph has no such site."""
        if site is Site.BLOCK_INPUT:
            return self.blocks[layer].input
        if site is Site.BLOCK_OUTPUT:
            return self.blocks[layer].output
        if self.final_norm_output is None:
            raise SiteNotFoundError("this graph has no final norm between the last block and the logits")
        return self.final_norm_output


@dataclass(frozen=True)
class _ResidualAdd:
    node: NodeProto
    output: str
    skip: str
    has_attention: bool


def find_residual_stream(model: ModelProto) -> ResidualStream:
    """Find the blocks and sites of a decoder graph.

    Raises `SiteNotFoundError` when there is no unique answer, with the nearest candidates.
    """
    graph = model.graph
    index = GraphIndex(graph)
    if any(node.op_type == "If" for node in graph.node):
        raise UnsupportedError(
            "the graph holds If bodies (a merged decoder); export one graph for prefill and decode"
        )
    adds = _chain(index, _logits(index))
    blocks = _blocks(index, adds)
    _cross_check_scopes(index, blocks)
    types = _value_types(model, [block.output for block in blocks])
    return ResidualStream(
        blocks=blocks,
        final_norm_output=_final_norm_output(index, blocks[-1].output),
        hidden_size=_width(types, blocks),
        elem_type=next(iter(types.values())).tensor_type.elem_type,
        attention_mask="attention_mask" if "attention_mask" in index.inputs else None,
    )


def is_steering(node: NodeProto) -> bool:
    """Whether a node was inserted by this project."""
    return node.name.startswith(STEERING_PREFIX)


def _logits(index: GraphIndex) -> str:
    outputs = [value.name for value in index.graph.output]
    return "logits" if "logits" in outputs else outputs[0]


def _chain(index: GraphIndex, logits: str) -> list[_ResidualAdd]:
    """The residual adds from the embedding to the final norm, in order."""
    upstream = index.ancestors(logits)
    candidates = [
        add
        for position, node in enumerate(index.nodes)
        if node.op_type == "Add"
        and upstream >> position & 1
        and (add := _residual_add(index, node)) is not None
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
    while (before := by_output.get(_source(index, chain[-1].skip))) is not None:
        chain.append(before)
    return chain[::-1]


def _residual_add(index: GraphIndex, node: NodeProto) -> _ResidualAdd | None:
    """Read `node` as the root of a sum `skip + branch + …`, or None when it is not a residual add."""
    if is_steering(node) or _feeds_only_a_sum(index, node):
        return None
    terms = list(_terms(index, node))
    for skip in terms:
        branches = [term for term in terms if term != skip]
        reached = [index.ancestors_through_matmul(branch) & index.bit(skip) for branch in branches]
        if branches and all(reached):
            own = 0
            for branch in branches:
                own |= index.ancestors(branch)
            own &= ~index.ancestors(skip)
            return _ResidualAdd(node, node.output[0], skip, _holds_attention(index, own))
    return None


def _terms(index: GraphIndex, node: NodeProto) -> Iterable[str]:
    """The terms of a sum of sums, as in `x + attention + mlp` of parallel blocks; constants left out."""
    for name in node.input:
        producer = index.producer_of(name)
        if producer is not None and producer.op_type == "Add" and _feeds_only_a_sum(index, producer):
            yield from _terms(index, producer)
        elif name not in index.constants:
            yield name


def _feeds_only_a_sum(index: GraphIndex, node: NodeProto) -> bool:
    consumers = index.consumers[node.output[0]]
    return (
        len(consumers) == 1
        and index.nodes[consumers[0]].op_type == "Add"
        and not is_steering(index.nodes[consumers[0]])
    )


def _holds_attention(index: GraphIndex, branch: int) -> bool:
    """Whether the nodes of a branch read a KV cache or, in a graph without one, compute attention."""
    caches = _cache_inputs(index)
    if caches:
        return any(branch & index.bit(name) for name in caches)
    return any(
        branch >> position & 1 and (node.op_type == "Softmax" or "Attention" in node.op_type)
        for position, node in enumerate(index.nodes)
    )


def _cache_inputs(index: GraphIndex) -> list[str]:
    """Graph inputs of rank 4: past keys and values [batch, kv_heads, past, head_dim]."""
    return [
        value.name
        for value in index.graph.input
        if value.name in index.inputs and len(value.type.tensor_type.shape.dim) == 4
    ]


def _source(index: GraphIndex, tensor: str) -> str:
    """The tensor that `tensor` is, seen through casts and through steering already in the graph."""
    while (node := index.producer_of(tensor)) is not None and (
        node.op_type in TRANSPARENT_OPS or is_steering(node)
    ):
        tensor = node.input[0]
    return tensor


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
    blocks = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(adds)], strict=True)):
        members = adds[start:end]
        blocks.append(
            Block(
                index=number,
                input=_steered(index, _source(index, members[0].skip)),
                output=_steered(index, members[-1].output),
                adds=tuple(describe(add.node) for add in members),
            )
        )
    caches = len(_cache_inputs(index))
    if caches and caches != 2 * len(blocks):
        raise SiteNotFoundError(
            f"found {len(blocks)} decoder blocks on the residual stream, but the graph has {caches} KV-cache "
            f"inputs; expected {2 * len(blocks)}"
        )
    return tuple(blocks)


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


def _final_norm_output(index: GraphIndex, stream_end: str) -> str | None:
    """Walk back from the logits over the head to the tensor that the head's matrix product reads."""
    tensor, head_passed = _logits(index), False
    end = index.bit(_source(index, stream_end))
    while (node := index.producer_of(tensor)) is not None:
        is_head = node.op_type in MATMUL_OPS and not head_passed
        if not is_head and (node.op_type not in HEAD_OPS or is_steering(node)):
            break
        computed = [name for name in node.input if name and index.ancestors(name) & end]
        if len(computed) != 1:
            break
        if head_passed and node.op_type in ("Add", "Mul", "Div", "Tanh"):
            break  # the norm's own weight or bias
        tensor, head_passed = computed[0], head_passed or is_head
    if not head_passed or _source(index, tensor) == _source(index, stream_end):
        return None
    return tensor


def _value_types(model: ModelProto, tensors: list[str]) -> dict[str, TypeProto]:
    """Types of stream tensors, from the file or, where it says nothing, by shape inference."""
    types = _recorded_types(model, tensors)
    if types:
        return types
    types = _recorded_types(onnx.shape_inference.infer_shapes(model), tensors)
    if not types:
        raise SiteNotFoundError(f"the type of the residual stream tensor {tensors[0]!r} cannot be inferred")
    return types


def _recorded_types(model: ModelProto, tensors: list[str]) -> dict[str, TypeProto]:
    graph = model.graph
    return {
        value.name: value.type
        for value in (*graph.value_info, *graph.output, *graph.input)
        if value.name in set(tensors)
        and value.type.tensor_type.elem_type
        and value.type.tensor_type.HasField("shape")
    }


def _width(types: dict[str, TypeProto], blocks: tuple[Block, ...]) -> int:
    """The last dimension of the stream; exporters write it as a number or as a numeric string."""
    widths = set()
    for value in types.values():
        dims = value.tensor_type.shape.dim
        if len(dims) == 3:
            widths.add(dims[2].dim_value or (int(dims[2].dim_param) if dims[2].dim_param.isdigit() else 0))
    if len(widths) != 1 or 0 in widths:
        raise SiteNotFoundError(
            f"the width of the residual stream at {blocks[0].output!r} is not a fixed number"
        )
    return widths.pop()


def _nearest(index: GraphIndex, upstream: int) -> str:
    adds = [
        describe(node)
        for position, node in enumerate(index.nodes)
        if node.op_type == "Add" and upstream >> position & 1
    ]
    return ", ".join(adds[-3:]) or "none (the graph has no Add)"
