"""A decoder graph of any depth and width whose weights were never written: its data file is sparse.

A random Qwen2 decoder of three blocks and a toy width goes through the project's exporter. Its middle block, as
the exporter wrote it, is then repeated, and every dimension replaced by that of the shape asked for. Nodes,
metadata, value info and interface are those of the exporter: its decoders grow by the same nodes with every block
behind the first. Dimensions: D width, F width of the MLP, H width of a head, V vocabulary.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from graph_passes.residual_stream import SCOPES_KEY
from graph_passes.tensor_sizes import tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

HEAD, MLP, VOCABULARY = 22, 26, 34
"""Toy H, F and V: numbers that nothing else in the graph is, so that each can be told and replaced."""
EXPORTED_BLOCKS, REPEATED = 3, 1
KEPT_INSIDE_BYTES = 1024
"""Tensors up to this size stay in the graph, as the exporter does it."""
ALIGNMENT = 4096


@dataclass(frozen=True)
class Shape:
    """A decoder's shape; its weights are float16."""

    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocabulary: int

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.heads * self.head_width


SHAPES = {
    "7b": Shape(blocks=32, heads=32, kv_heads=32, head_width=128, mlp=11_008, vocabulary=152_064),
    "70b": Shape(blocks=80, heads=64, kv_heads=8, head_width=128, mlp=28_672, vocabulary=152_064),
    "toy": Shape(blocks=5, heads=4, kv_heads=2, head_width=16, mlp=96, vocabulary=128),
}
"""32 blocks of width 4096 and 80 of width 8192, and one for tests."""


@dataclass(frozen=True)
class ScaledDecoder:
    """A graph beside its sparse data file."""

    graph: Path
    data: Path
    shape: Shape
    nodes: int

    @classmethod
    def make(cls, shape: Shape, folder: Path) -> ScaledDecoder:
        """Write `decoder.onnx` and its data file, of which not a byte is written, to a folder."""
        graph, data = folder / "decoder.onnx", folder / "decoder.onnx_data"
        model = export_blocks(shape, EXPORTED_BLOCKS, folder / "exported.onnx")
        model = _repeat(model, shape.blocks)
        sizes = {HEAD: shape.head_width, HEAD // 2: shape.head_width // 2, MLP: shape.mlp}
        sizes |= {VOCABULARY: shape.vocabulary, shape.heads * HEAD: shape.width}
        sizes |= {shape.kv_heads * HEAD: shape.kv_heads * shape.head_width}
        size = _widen(model, sizes, data.name)
        graph.write_bytes(model.SerializeToString())
        with data.open("wb") as file:
            file.truncate(size)
        return cls(graph, data, shape, len(model.graph.node))


def export_blocks(shape: Shape, blocks: int, path: Path) -> ModelProto:
    """So many blocks at toy width, by the exporter; no two weights are equal, so that it merges none."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sarsteer_export.exporting.export import export_decoder

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.heads * HEAD,
        intermediate_size=MLP,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    export_decoder(model.half(), path)
    return onnx.load(path)


def _repeat(model: ModelProto, blocks: int) -> ModelProto:
    """Put copies of the middle block in its place, until there are `blocks` blocks."""
    graph = model.graph
    owned = _nodes_of_block(graph, REPEATED)
    inside = {name for node in owned for name in node.output}
    readers = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(id(node))
    members = {id(node) for node in owned}
    own_weights = {
        tensor.name
        for tensor in graph.initializer
        if readers[tensor.name] and readers[tensor.name] <= members
    }
    own_inputs = {value.name for value in graph.input if f".{REPEATED}." in value.name}
    (end,) = {name for node in graph.node if id(node) not in members for name in node.input if name in inside}
    starts = [name for node in owned for name in node.input if _produced_in_block(graph, name, REPEATED - 1)]
    start = max(set(starts), key=lambda name: _position(graph, name))
    copies = blocks - EXPORTED_BLOCKS + 1
    last, numbered = blocks - 1, {EXPORTED_BLOCKS - 1: blocks - 1}

    def named(number: int) -> Callable[[str], str]:
        def rename(name: str) -> str:
            if number == REPEATED:
                return name
            if name == start:
                return named(number - 1)(end)
            if name in own_inputs or name in own_weights or name in inside:
                moved = name.replace(f".{REPEATED}.", f".{number}.")
                return moved if moved != name else f"{name}#{number}"
            return name

        return rename

    def behind(name: str) -> str:
        if name == end:
            return named(copies)(end)
        return re.sub(rf"\b(past_key_values|present|layers)\.{EXPORTED_BLOCKS - 1}\.", rf"\1.{last}.", name)

    result = ModelProto()
    result.CopyFrom(model)
    for field in ("node", "initializer", "input", "output", "value_info"):
        result.graph.ClearField(field)
    ordered = list(graph.node)
    place = min(position for position, node in enumerate(ordered) if id(node) in members and _scoped(node))
    for position, node in enumerate(ordered):
        if position == place:
            for number in range(1, copies + 1):
                result.graph.node.extend(
                    _renamed(node_, named(number), {REPEATED: number}) for node_ in owned
                )
        if id(node) not in members:
            result.graph.node.append(_renamed(node, behind, numbered))
    for field, repeated in (
        ("initializer", own_weights),
        ("input", own_inputs),
        ("output", inside),
        ("value_info", inside | own_weights),
    ):
        written = getattr(result.graph, field)
        waiting = [item for item in getattr(graph, field) if item.name in repeated]
        for item in getattr(graph, field):
            if item.name not in repeated:
                _add(written, item, behind)
                continue
            for number in range(
                1, copies + 1
            ):  # all of one block, then all of the next, as the exporter does
                for one in waiting:
                    _add(written, one, named(number))
            waiting = []
    return result


def _add(written: Any, item: Any, rename: Callable[[str], str]) -> None:
    copy = written.add()
    copy.CopyFrom(item)
    copy.name = rename(item.name)


def _nodes_of_block(graph: GraphProto, block: int) -> list[NodeProto]:
    """The nodes whose scope is a block, and those that only its KV cache leads to."""
    own = {value.name for value in graph.input if value.name.startswith(f"past_key_values.{block}.")}
    nodes = []
    for node in graph.node:
        scope = _block_of(node)
        if scope == block or (scope is None and set(node.input) & own):
            nodes.append(node)
            if scope is None:
                own.update(node.output)
    return nodes


def _scoped(node: NodeProto) -> bool:
    return _block_of(node) is not None


def _block_of(node: NodeProto) -> int | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "")
    found = re.findall(r"layers\.(\d+)", scopes)
    return int(found[-1]) if found else None


def _produced_in_block(graph: GraphProto, name: str, block: int) -> bool:
    return any(name in node.output and _block_of(node) == block for node in graph.node)


def _position(graph: GraphProto, name: str) -> int:
    return next(position for position, node in enumerate(graph.node) if name in node.output)


def _renamed(node: NodeProto, rename: Callable[[str], str], blocks: Mapping[int, int]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [rename(name) for name in node.input]
    copy.output[:] = [rename(name) for name in node.output]
    ((old, new),) = blocks.items()
    if _block_of(node) == old or copy.output != node.output:
        copy.name = f"{node.name}#{new}"
    for entry in copy.metadata_props:
        entry.value = entry.value.replace(f"layers.{old}", f"layers.{new}")
    return copy


def _widen(model: ModelProto, sizes: Mapping[int, int], data: str) -> int:
    """Replace every toy size, and put all weights into a data file; returns the size that file has."""
    end = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            values = numpy_helper.to_array(tensor)
            wide = np.array([sizes.get(int(value), int(value)) for value in values.flat]).reshape(
                values.shape
            )
            tensor.CopyFrom(numpy_helper.from_array(wide.astype(np.int64), tensor.name))
            continue
        tensor.dims[:] = [sizes.get(dim, dim) for dim in tensor.dims]
        size = tensor_bytes(tensor) or 0
        if size <= KEPT_INSIDE_BYTES:
            if tensor.dims:  # scalars keep their values
                tensor.raw_data = bytes(size)
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data), ("offset", str(end)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    for value in _values(model.graph):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                dim.dim_value = sizes.get(dim.dim_value, dim.dim_value)
            elif dim.dim_param.isdigit():
                dim.dim_param = str(sizes.get(int(dim.dim_param), int(dim.dim_param)))
    return end


def _values(graph: GraphProto) -> Iterable[ValueInfoProto]:
    return (*graph.value_info, *graph.input, *graph.output)
