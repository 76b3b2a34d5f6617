"""The residual stream of a graph as a table: every site, what makes its tensor, what reads it, how it is steered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import helper

from calibration.plan import Site
from graph_passes.edits_in_graph import EditInGraph, SteeringReader
from graph_passes.fused_norms import fused_sums, split_fused_norms
from graph_passes.graph_index import GraphIndex
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX, is_steering

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnx import ModelProto, NodeProto

    from graph_passes.residual_stream import ResidualStream

OUTPUT = "graph output"
"""Stands in for the operator where a tensor is an output of the graph."""


@dataclass(frozen=True)
class NodeName:
    """A node by operator and name; unnamed ones go by their first output."""

    op: str
    name: str


@dataclass(frozen=True)
class SharedNode:
    """An inserted node that belongs to no edit: the graph inputs and the shared tensors it reads, and what it makes."""

    op: str
    name: str
    inputs: tuple[str, ...]
    reads: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class SiteRow:
    """One site: its tensor (B, S, D), its dtype, the node that makes it, those that read it, and its edits in order."""

    layer: int
    site: str
    tensor: str
    dtype: str
    producer: NodeName | None
    consumers: tuple[NodeName, ...]
    edits: tuple[EditInGraph, ...]


@dataclass(frozen=True)
class StreamTable:
    """All sites in order, and the inserted nodes that several edits share."""

    hidden_size: int
    dtype: str
    rows: tuple[SiteRow, ...]
    shared: tuple[SharedNode, ...]

    @property
    def shared_tensors(self) -> tuple[str, ...]:
        """What edits read of the shared nodes, each once: masks, rows of last positions, strengths."""
        return shared_tensors(edit for row in self.rows for edit in row.edits)


def shared_tensors(edits: Iterable[EditInGraph]) -> tuple[str, ...]:
    """The shared tensors that edits read, each once."""
    return tuple(dict.fromkeys(name for edit in edits for node in edit.nodes for name in node.shared))


def makers(shared: Sequence[SharedNode], tensor: str) -> tuple[SharedNode, ...]:
    """The shared nodes that `tensor` depends on, in the graph's order."""
    wanted, found = {tensor}, []
    for node in reversed(shared):
        if node.output in wanted:
            wanted.update(node.reads)
            found.append(node)
    return tuple(reversed(found))


def stream_table(model: ModelProto, stream: ResidualStream) -> StreamTable:
    """The table of a flat graph (`Scope.view`), steered or not, whose residual stream is `stream`."""
    return _Table(model, stream).table()


class _Table:
    def __init__(self, model: ModelProto, stream: ResidualStream) -> None:
        self.stream = stream
        self.origins = fused_sums(model)
        self.index = GraphIndex(split_fused_norms(model).graph)
        self.names = {node.name for node in model.graph.node}
        self.outputs = {value.name for value in model.graph.output}
        self.reader = SteeringReader(self.index, self.origins)

    def table(self) -> StreamTable:
        sites = [
            (block.index, site)
            for block in self.stream.blocks
            for site in (Site.BLOCK_INPUT, Site.BLOCK_OUTPUT)
        ]
        if self.stream.final_norm_output is not None:
            sites.append((self.stream.blocks[-1].index, Site.FINAL_NORM_OUTPUT))
        return StreamTable(
            hidden_size=self.stream.hidden_size,
            dtype=dtype_name(self.stream.elem_type),
            rows=tuple(self._row(layer, site) for layer, site in sites),
            shared=self._shared(),
        )

    def _shared(self) -> tuple[SharedNode, ...]:
        nodes = [node for node in self.reader.shared() if node.name in self.names and node.output]
        made = {node.output[0] for node in nodes}
        inputs = {value.name for value in self.index.graph.input}  # those with a default value too
        return tuple(
            SharedNode(
                op=node.op_type,
                name=node.name,
                inputs=tuple(name for name in node.input if name in inputs),
                reads=tuple(name for name in node.input if name in made),
                output=node.output[0],
            )
            for node in nodes
        )

    def _row(self, layer: int, site: Site) -> SiteRow:
        tensor = self._steered(self.stream.tensor(site, layer))
        producer = self._producer(tensor)
        return SiteRow(
            layer=layer,
            site=site.value,
            tensor=tensor,
            dtype=dtype_name(self.stream.elem_type_of(tensor)),
            producer=None if producer is None else self._name(producer),
            consumers=self._consumers(tensor),
            edits=self._edits(layer, site, tensor),
        )

    def _steered(self, tensor: str) -> str:
        return STEERED_PREFIX + tensor if STEERED_PREFIX + tensor in self.index.producer else tensor

    def _producer(self, tensor: str) -> NodeProto | None:
        """The decoder's own node that makes `tensor`, seen through steering."""
        unsteered = UNSTEERED_PREFIX + tensor
        if unsteered in self.index.producer:
            return self.index.producer_of(unsteered)
        return self.index.producer_of(tensor.removeprefix(STEERED_PREFIX))

    def _consumers(self, tensor: str) -> tuple[NodeName, ...]:
        readers = [self.index.nodes[position] for position in self.index.consumers[tensor]]
        names = [self._name(node) for node in readers if not is_steering(node)]
        names += [NodeName(OUTPUT, tensor)] if tensor in self.outputs else []
        return tuple(dict.fromkeys(names))

    def _name(self, node: NodeProto) -> NodeName:
        origin = self.origins.get(node.output[0], node)
        return NodeName(origin.op_type, origin.name or origin.output[0])

    def _edits(self, layer: int, site: Site, tensor: str) -> tuple[EditInGraph, ...]:
        """The edits of this site alone: the output of a block and the input of the next are one tensor."""
        at_tensor = self.reader.edits_at(tensor)
        named = tuple(edit for edit in at_tensor if (edit.layer, edit.site) == (layer, site.value))
        return self.reader.edits_within(layer, site.value) + named


def dtype_name(elem_type: int) -> str:
    """An ONNX element type as numpy and people call it: `float16`."""
    try:
        return str(helper.tensor_dtype_to_np_dtype(elem_type).name)
    except KeyError:  # a damaged file may say any number
        return f"type {elem_type}"
