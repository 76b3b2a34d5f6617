"""Insert the edits of a plan into a decoder graph.

Edits are built with graph-surgeon as one small graph per stream tensor and then spliced into the original
protobuf: a steered tensor keeps its name, what its producer computes is renamed, and the inserted nodes
stand right behind it. Whoever reads the tensor, the next norm, the next residual add or a graph output of
that name, reads the edited one. Nothing else of the file is rewritten, so nothing else can be lost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Edit, Positions, Site, SteeringPlan
from graph_passes.fused_norms import split_fused_norms
from graph_passes.graph_index import GraphIndex, rename_reads
from graph_passes.lowering import Stream, lower, lower_last_positions
from graph_passes.residual_stream import STEERED_PREFIX, STEERING_PREFIX, UNSTEERED_PREFIX, ResidualStream

if TYPE_CHECKING:
    from collections.abc import Sequence

MINIMUM_OPSET = 13
"""Squeeze and Unsqueeze take their axes as inputs from this opset on."""
BFLOAT16_OPSET = 16
"""Where takes bfloat16 from this opset on."""


@dataclass(frozen=True)
class InsertedEdit:
    """One edit as it stands in the graph: the stream tensor it acts on, its nodes and its constants."""

    number: int
    layer: int
    site: Site
    op: str
    positions: Positions
    strength: float
    anchor: str
    nodes: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class _Splice:
    """Nodes and constants to insert behind what computes `anchor`; none computes a graph input."""

    anchor: str
    nodes: Sequence[NodeProto]
    constants: Sequence[TensorProto]


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set. Raises `UnsupportedError` below the oldest supported one."""
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version < MINIMUM_OPSET:
        raise UnsupportedError(
            f"the graph's opset is {version}; expected at least {MINIMUM_OPSET}; export it again"
        )
    return version


def edit_names(edits: Sequence[Edit]) -> list[str]:
    """Stable unique names `sarsteer.{layer}.{site}.{op}.{n}`; n counts edits of one site and operation."""
    seen: Counter[str] = Counter()
    names = []
    for edit in edits:
        stem = f"{STEERING_PREFIX}{edit.layer}.{edit.site.value}.{edit.op}"
        names.append(f"{stem}.{seen[stem]}")
        seen[stem] += 1
    return names


def insert_edits(
    model: ModelProto, stream: ResidualStream, plan: SteeringPlan, *, last_from_mask: bool = True
) -> tuple[ModelProto, tuple[InsertedEdit, ...]]:
    """Return a copy of `model` with every edit of `plan` in it, and where each one stands.

    With `last_from_mask`, `last` is found from the graph's attention mask; otherwise it is the sequence's
    last position. Edits of one tensor act in this order: block output, then block input of the next block,
    each in the plan's order. Raises `InputError` when the graph is steered already.
    """
    _refuse_steered(GraphIndex(model.graph))
    model = split_fused_norms(model, {stream.tensor(edit.site, edit.layer) for edit in plan.edits})
    index = GraphIndex(model.graph)
    opset = opset_of(model)
    anchors = by_anchor(stream, plan)
    splices: list[_Splice] = []
    last = None
    if any(edit.positions is Positions.LAST for edit in plan.edits):
        steered_first = stream.blocks[0].input in anchors
        last, splice = _last_positions(
            stream, index, opset, from_mask=last_from_mask, steered_first=steered_first
        )
        splices.append(splice)
    names = edit_names(plan.edits)
    inserted: list[InsertedEdit] = []
    for anchor, numbers in anchors.items():
        lowering = Stream(stream.elem_type_of(anchor), last)
        if lowering.elem_type == TensorProto.BFLOAT16 and opset < BFLOAT16_OPSET:
            raise UnsupportedError(
                f"the graph's opset is {opset}; a bfloat16 stream needs at least {BFLOAT16_OPSET}; "
                "export it again"
            )
        splice, records = _splice_edits(anchor, numbers, plan, names, lowering, index, opset)
        splices.append(splice)
        inserted.extend(records)
    steered = ModelProto()
    steered.CopyFrom(model)
    _apply(steered.graph, index, splices)
    return steered, tuple(sorted(inserted, key=lambda edit: edit.number))


def _refuse_steered(index: GraphIndex) -> None:
    taken = [name for name in (*index.constants, *index.producer) if name.startswith(STEERING_PREFIX)]
    if taken:
        raise InputError(
            f"the graph is steered already: it holds {sorted(taken)[0]!r}; patch the unsteered graph instead"
        )


class StreamTensors(Protocol):
    """Whatever knows a name for the tensor of the stream at a site; equal names are one tensor."""

    def tensor(self, site: Site, layer: int) -> str:
        """The tensor at `site` of block `layer`."""
        ...


def by_anchor(stream: StreamTensors, plan: SteeringPlan) -> dict[str, list[int]]:
    """The numbers of a plan's edits per stream tensor, in the order in which they act there."""
    order = {Site.BLOCK_OUTPUT: 0, Site.BLOCK_INPUT: 1, Site.FINAL_NORM_OUTPUT: 2}
    anchors: dict[str, list[int]] = {}
    for number in sorted(range(len(plan.edits)), key=lambda number: order[plan.edits[number].site]):
        edit = plan.edits[number]
        anchors.setdefault(stream.tensor(edit.site, edit.layer), []).append(number)
    return anchors


def _last_positions(
    stream: ResidualStream, index: GraphIndex, opset: int, *, from_mask: bool, steered_first: bool
) -> tuple[gs.Variable, _Splice]:
    """The nodes that mark last positions, behind the start of the stream, whose shape they read.

    `steered_first`: an edit acts at the very start, so that what the embedding computes is renamed.
    """
    if from_mask and stream.attention_mask is None:
        raise UnsupportedError(
            "the graph has no input 'attention_mask' [batch, past + sequence] to find the last position of "
            "each row from; if rows are never padded on the right, use --last-from sequence"
        )
    anchor = stream.blocks[0].input
    renamed = steered_first and anchor in index.producer
    hidden = gs.Variable(UNSTEERED_PREFIX + anchor if renamed else anchor)
    mask = gs.Variable(stream.attention_mask) if from_mask else None
    lowered = lower_last_positions(hidden, mask, opset)
    graph = _export(lowered.nodes, [hidden] + ([] if mask is None else [mask]), lowered.output, opset)
    return lowered.output, _Splice(anchor, graph.node, graph.initializer)


def _splice_edits(
    anchor: str,
    numbers: Sequence[int],
    plan: SteeringPlan,
    names: Sequence[str],
    lowering: Stream,
    index: GraphIndex,
    opset: int,
) -> tuple[_Splice, list[InsertedEdit]]:
    is_input = anchor not in index.producer
    before = gs.Variable(anchor if is_input else UNSTEERED_PREFIX + anchor, dtype=lowering.numpy_dtype)
    hidden, nodes, records = before, [], []
    for number in numbers:
        edit = plan.edits[number]
        lowered = lower(edit, names[number], hidden, lowering)
        hidden = lowered.output
        nodes += lowered.nodes
        constants = {
            tensor.name: None
            for node in lowered.nodes
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant)
        }
        records.append(
            InsertedEdit(
                number=number,
                layer=edit.layer,
                site=edit.site,
                op=edit.op,
                positions=edit.positions,
                strength=float(edit.strength),
                anchor=anchor,
                nodes=tuple(node.name for node in lowered.nodes),
                constants=tuple(constants),
            )
        )
    hidden.name = STEERED_PREFIX + anchor if is_input else anchor
    outside = [before] + ([] if lowering.last is None else [lowering.last])
    graph = _export(nodes, outside, hidden, opset)
    return _Splice(anchor, graph.node, graph.initializer), records


def _export(nodes: list[gs.Node], inputs: list[gs.Variable], output: gs.Variable, opset: int) -> GraphProto:
    graph = gs.Graph(nodes=nodes, inputs=inputs, outputs=[output], opset=opset)
    exported: ModelProto = gs.export_onnx(graph, do_type_check=False)
    return exported.graph


def _apply(graph: GraphProto, index: GraphIndex, splices: Sequence[_Splice]) -> None:
    """Rename what producers compute and write the nodes anew, the inserted ones in their places."""
    behind: dict[int, list[NodeProto]] = {}
    nodes = list(graph.node)
    types = {value.name: value for value in (*graph.value_info, *graph.output)}
    for splice in splices:
        position = index.producer.get(splice.anchor, -1)
        behind.setdefault(position, []).extend(splice.nodes)
        graph.initializer.extend(splice.constants)
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
