"""Write inserted nodes into a protobuf: each splice stands right behind what computes the tensor it acts on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from graph_passes.graph_index import GraphIndex, rename_reads
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Splice:
    """Nodes to insert behind what computes `anchor` (none computes a graph input), and their constants.

    `renames`: what a node reads instead, by node and tensor. `appended`: an input that a node gets in the end.
    """

    anchor: str
    nodes: Sequence[NodeProto]
    constants: Sequence[TensorProto]
    renames: Sequence[tuple[str, str, str]] = field(default=())
    appended: Sequence[tuple[str, str]] = field(default=())


def export_nodes(nodes: Sequence[gs.Node], opset: int) -> GraphProto:
    """Nodes and their constants as protobufs; what no node computes is taken as given."""
    computed = {id(tensor) for node in nodes for tensor in node.outputs}
    read = {tensor.name: tensor for node in nodes for tensor in node.inputs}
    given = [t for t in read.values() if id(t) not in computed and not isinstance(t, gs.Constant)]
    exported: ModelProto = gs.export_onnx(
        gs.Graph(nodes=list(nodes), inputs=given, opset=opset), do_type_check=False
    )
    return exported.graph


def apply_splices(
    graph: GraphProto, outermost: GraphProto, index: GraphIndex, splices: Sequence[Splice]
) -> None:
    """Rename what producers compute and write the nodes anew, the inserted ones in their places.

    Constants go to the outermost graph, where the bodies of an `If` share them.
    """
    behind: dict[int, list[NodeProto]] = {}
    nodes = list(graph.node)
    types = {value.name: value for value in (*graph.value_info, *graph.output)}
    held = {tensor.name for tensor in outermost.initializer}
    for splice in splices:
        position = index.producer.get(splice.anchor, -1)
        behind.setdefault(position, []).extend(splice.nodes)
        outermost.initializer.extend(tensor for tensor in splice.constants if tensor.name not in held)
        held.update(tensor.name for tensor in splice.constants)
        for output, old, new in splice.renames:
            rename_reads(nodes[index.producer[output]], old, new)
        for output, name in splice.appended:
            nodes[index.producer[output]].input.append(name)
        produced = {name for node in splice.nodes for name in node.output}
        if splice.anchor in produced:
            outputs = nodes[position].output
            outputs[list(outputs).index(splice.anchor)] = UNSTEERED_PREFIX + splice.anchor
            if splice.anchor in types:
                _copy_type(graph, types[splice.anchor], UNSTEERED_PREFIX + splice.anchor)
        elif STEERED_PREFIX + splice.anchor in produced:
            for consumer in index.consumers[splice.anchor]:
                rename_reads(nodes[consumer], splice.anchor, STEERED_PREFIX + splice.anchor)
    order = list(behind.get(-1, []))
    for position, node in enumerate(nodes):
        order.append(node)
        order.extend(behind.get(position, []))
    rewritten = GraphProto()
    rewritten.node.extend(order)
    del graph.node[:]
    graph.node.extend(rewritten.node)


def _copy_type(graph: GraphProto, value: ValueInfoProto, name: str) -> None:
    copy = graph.value_info.add()
    copy.CopyFrom(value)
    copy.name = name
