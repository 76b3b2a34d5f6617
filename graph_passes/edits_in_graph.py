"""Read from a graph the nodes that steering inserted at a stream tensor, edit by edit, in the order in which they act.

Only the wiring is followed, back from the stream tensor over inserted nodes; names say which of these belong
to one edit. What several edits share, such as the mask of last positions, is told apart from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from calibration.errors import InputError
from graph_passes.names import STEERING_PREFIX, edit_of, is_steering

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import NodeProto, TensorProto

    from graph_passes.graph_index import GraphIndex

MOST_DIGITS = 9
"""A number of a block that is longer is none."""


@dataclass(frozen=True)
class EditConstant:
    """A constant of an edit. `norm` is its Euclidean norm, a scalar's magnitude; None when in external data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None

    @property
    def key(self) -> str:
        """Its name within the edit, as `vector`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class EditNode:
    """One node of an edit, and what it reads: the stream, its edit's constants and other nodes, what is shared."""

    op: str
    name: str
    reads_stream: bool
    constants: tuple[EditConstant, ...]
    own: tuple[str, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True)
class EditInGraph:
    """One edit as it stands in a graph.

    `positions`: what its mask marks, `all` where it has none. `inserted`: False where no inserted node adds the
    edit to the stream, but a node of the decoder itself, the last of `nodes`, as a bias or as part of its bias.
    """

    name: str
    layer: int | None
    site: str | None
    op: str
    positions: str
    inserted: bool
    nodes: tuple[EditNode, ...]

    @property
    def constants(self) -> tuple[EditConstant, ...]:
        """Its constants, each once, in the order in which they are read."""
        return tuple(dict.fromkeys(constant for node in self.nodes for constant in node.constants))


class SteeringReader:
    """Reads the edits of one flat graph. `origins`: the fused node behind each sum that was split from one."""

    def __init__(self, index: GraphIndex, origins: Mapping[str, NodeProto]) -> None:
        self.index, self.origins = index, origins
        self.tensors = {
            tensor.name: tensor
            for tensor in index.graph.initializer
            if tensor.name.startswith(STEERING_PREFIX)
        }
        self.in_decoder_nodes = self._read_by_decoder_nodes()

    def edits_at(self, tensor: str) -> tuple[EditInGraph, ...]:
        """The edits whose nodes stand between what is computed for `tensor` and `tensor` itself."""
        members: set[int] = set()
        pending = [tensor]
        while pending:
            position = self.index.producer.get(pending.pop())
            if position is None or position in members or not is_steering(self.index.nodes[position]):
                continue
            if edit_of(self.index.nodes[position].name) is not None:
                members.add(position)
                pending += self.index.nodes[position].input
        grouped: dict[str, list[NodeProto]] = {}
        for position in sorted(members, reverse=True):  # the order of edits is that of their last nodes
            node = self.index.nodes[position]
            grouped.setdefault(edit_of(node.name) or node.name, []).append(node)
        return tuple(self._edit(name, nodes[::-1]) for name, nodes in reversed(grouped.items()))

    def edits_within(self, layer: int, site: str) -> tuple[EditInGraph, ...]:
        """The edits at a site that are constants of the decoder's own nodes, or added to such constants."""
        return tuple(edit for edit in self.in_decoder_nodes if (edit.layer, edit.site) == (layer, site))

    def shared(self) -> tuple[NodeProto, ...]:
        """The inserted nodes that belong to no edit: positions, masks, strengths, zeros beside split sums."""
        return tuple(node for node in self.index.nodes if is_steering(node) and edit_of(node.name) is None)

    def _edit(self, name: str, nodes: list[NodeProto]) -> EditInGraph:
        made = {output for node in nodes for output in node.output}
        members = tuple(self._node(node, made) for node in nodes)
        masks = [
            node.input[0]
            for node in nodes
            if node.op_type == "Where" and node.input and node.input[0].startswith(STEERING_PREFIX)
        ]
        return _edit_named(name, _mask_kind(masks[0]) if masks else "all", members, inserted=True)

    def _node(self, node: NodeProto, made: set[str]) -> EditNode:
        constants = [self._constant(self.tensors[name]) for name in node.input if name in self.tensors]
        own = [name for name in node.input if name in made]
        others = [name for name in node.input if name and name not in made and name not in self.tensors]
        shared = [name for name in others if self._is_shared(name)]
        return EditNode(
            op=node.op_type,
            name=node.name,
            reads_stream=any(name not in shared and name not in self.index.constants for name in others),
            constants=tuple(constants),
            own=tuple(own),
            shared=tuple(shared),
        )

    def _is_shared(self, tensor: str) -> bool:
        producer = self.index.producer_of(tensor)
        return producer is not None and is_steering(producer) and edit_of(producer.name) is None

    def _constant(self, tensor: TensorProto) -> EditConstant:
        dtype, norm = "external", None
        if not uses_external_data(tensor):
            try:
                values = numpy_helper.to_array(tensor)
                dtype, norm = str(values.dtype), float(np.linalg.norm(values.astype(np.float64)))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"the steering constant {tensor.name!r} is damaged ({error})") from error
        return EditConstant(tensor.name, dtype, tuple(tensor.dims), norm)

    def _read_by_decoder_nodes(self) -> tuple[EditInGraph, ...]:
        """Vectors that the decoder's own nodes add to the stream, and sums of such vectors and the decoder's biases."""
        found = []
        for name, tensor in self.tensors.items():
            edit, readers = edit_of(name), self._decoder_nodes_reading(name)
            if edit is not None and readers:
                constants = (self._constant(tensor),)
                nodes = tuple(EditNode(node.op_type, node.name, True, constants, (), ()) for node in readers)
                found.append(_edit_named(edit, "all", nodes, inserted=False))
        for node in self.index.nodes:
            edit = edit_of(node.name) if is_steering(node) else None
            if edit is None or any(self.index.is_computed(name) for name in node.input if name):
                continue
            readers = self._decoder_nodes_reading(node.output[0])
            own = tuple(
                EditNode(reader.op_type, reader.name, True, (), (node.name,), ()) for reader in readers
            )
            if own:
                found.append(_edit_named(edit, "all", (self._node(node, set()), *own), inserted=False))
        return tuple(found)

    def _decoder_nodes_reading(self, tensor: str) -> list[NodeProto]:
        readers = [self.index.nodes[position] for position in self.index.consumers[tensor]]
        return [
            self.origins.get(node.output[0], node)
            for node in readers
            if node.output and not is_steering(node)
        ]


def _edit_named(name: str, positions: str, nodes: tuple[EditNode, ...], *, inserted: bool) -> EditInGraph:
    _, layer, site, op, *_ = [*name.split("."), "", "", ""]
    return EditInGraph(
        name=name,
        layer=int(layer) if layer.isdecimal() and len(layer) < MOST_DIGITS else None,
        site=site or None,
        op=op or "edit",
        positions=positions,
        inserted=inserted,
        nodes=nodes,
    )


def _mask_kind(tensor: str) -> str:
    """`last` of `sarsteer.last.mask`, `first:2` of `sarsteer.first_2.mask`, `all` of `sarsteer.all.active.nonzero`."""
    return tensor.removeprefix(STEERING_PREFIX).partition(".")[0].replace("_", ":")
