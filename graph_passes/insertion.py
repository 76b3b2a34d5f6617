"""Insert the edits of a plan into a decoder graph.

Edits are built with graph-surgeon as one small graph per stream tensor and then spliced into the original
protobuf: a steered tensor keeps its name, what its producer computes is renamed, and the inserted nodes
stand right behind it. Whoever reads the tensor, the next norm, the next residual add or a graph output of
that name, reads the edited one. Nothing else of the file is rewritten, so nothing else can be lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Positions, Site, SteeringPlan
from graph_passes.forms import Choice, Form, bias_of, choose
from graph_passes.fused_norms import split_in_place
from graph_passes.graph_index import GraphIndex, rename_reads
from graph_passes.lowering import Lowered, StreamType, lower, lower_onto_bias, scaled_vector
from graph_passes.names import STEERED_PREFIX, STEERING_PREFIX, UNSTEERED_PREFIX, edit_names
from graph_passes.opened_calls import calls_in_the_way, open_calls
from graph_passes.residual_stream import ResidualStream, cache_inputs, find_residual_streams
from graph_passes.scopes import Scope, decoder_scopes
from graph_passes.selection import (
    LAST_NODE,
    POSITIONS_INPUT,
    PROMPT_LENGTHS_INPUT,
    STRENGTH_INPUT,
    Around,
    LastFrom,
    PromptFrom,
    Selection,
    SteeringInputs,
    StrengthInput,
    inputs_told,
    share,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MINIMUM_OPSET = 13
"""Squeeze and Unsqueeze take their axes as inputs from this opset on."""
BFLOAT16_OPSET = 16
"""Where takes bfloat16 from this opset on."""
OVERRIDABLE_IR_VERSION = 4
"""From this IR version on an initializer that is also an input is a default, which a runtime may be fed over."""


@dataclass(frozen=True)
class InsertedEdit:
    """One edit as it stands in the graph: the stream tensor it acts on, its form, its nodes and its constants.

    `scope`: the body it stands in, empty for the graph itself.
    """

    number: int
    layer: int
    site: Site
    op: str
    positions: str
    strength: float
    anchor: str
    form: Form
    why: str
    nodes: tuple[str, ...]
    constants: tuple[str, ...]
    scope: str = ""


@dataclass(frozen=True)
class _Splice:
    """Nodes to insert behind what computes `anchor` (none computes a graph input), and their constants.

    `renames`: what a node reads instead, by node and tensor. `appended`: an input that a node gets in the end.
    """

    anchor: str
    nodes: Sequence[NodeProto]
    constants: Sequence[TensorProto]
    renames: Sequence[tuple[str, str, str]] = field(default=())
    appended: Sequence[tuple[str, str]] = field(default=())


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set. Raises `UnsupportedError` below the oldest supported one."""
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if version < MINIMUM_OPSET:
        raise UnsupportedError(
            f"the graph's opset is {version}; expected at least {MINIMUM_OPSET}; export it again"
        )
    return version


def insert_edits(
    model: ModelProto,
    streams: Mapping[Scope, ResidualStream],
    plan: SteeringPlan,
    inputs: SteeringInputs = SteeringInputs(),  # noqa: B008 - frozen
) -> tuple[ModelProto, tuple[InsertedEdit, ...]]:
    """Return a copy of `model` with every edit of `plan` in each of its scopes, and where each one stands.

    Edits of one tensor act in this order: block output, then block input of the next block, each in the plan's
    order. Raises `InputError` when the graph is steered already, `UnsupportedError` when it cannot be told what
    `inputs` asks for.
    """
    _refuse_steered(model)
    opset = opset_of(model)
    steered = ModelProto()
    steered.CopyFrom(model)
    streams = _opened(steered, streams, plan)
    inserted: list[InsertedEdit] = []
    for scope, stream in streams.items():
        inserting = _Insertion(scope, stream, plan, inputs, opset)
        inserted += inserting.insert(steered)
    add_steering_inputs(steered, plan, inputs)
    return steered, tuple(inserted)


def _opened(
    model: ModelProto, streams: Mapping[Scope, ResidualStream], plan: SteeringPlan
) -> Mapping[Scope, ResidualStream]:
    """Open, in `model` itself, the calls of functions that stand in the way of edits; the streams as they are then."""
    if not model.functions:
        return streams
    while True:
        in_the_way = {
            scope: calls
            for scope, stream in streams.items()
            if (calls := calls_in_the_way(model, scope, by_anchor(stream, plan)))
        }
        if not in_the_way:
            return streams
        for scope, calls in in_the_way.items():
            open_calls(model, scope, calls)
        streams = find_residual_streams(model)


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


def add_steering_inputs(model: ModelProto, plan: SteeringPlan, inputs: SteeringInputs) -> None:
    """Give a graph the inputs by which it is told positions and strength; strength has a default of 1."""
    ports: list[tuple[str, int, list[str | int]]] = []
    batch = _batch_dimension(model)
    if inputs.last_from is LastFrom.INPUT and any(edit.positions == Positions.LAST for edit in plan.edits):
        ports.append((POSITIONS_INPUT, TensorProto.INT64, [batch]))
    if inputs.prompt_from is PromptFrom.INPUT and any(
        edit.positions.needs_prompt_length for edit in plan.edits
    ):
        ports.append((PROMPT_LENGTHS_INPUT, TensorProto.INT64, [batch]))
    if inputs.strength is not None:
        if model.ir_version < OVERRIDABLE_IR_VERSION:
            raise UnsupportedError(
                f"the graph's IR version is {model.ir_version}; a strength that may be left out needs at least "
                f"{OVERRIDABLE_IR_VERSION}; export it again"
            )
        per_edit = [len(plan.edits)] if inputs.strength is StrengthInput.EDITS else []
        ports.append((STRENGTH_INPUT, TensorProto.FLOAT, [batch, *per_edit]))
        default = np.ones([1, *per_edit], dtype=np.float32)
        model.graph.initializer.append(
            helper.make_tensor(STRENGTH_INPUT, TensorProto.FLOAT, default.shape, default.tobytes(), raw=True)
        )
    taken = {value.name for value in model.graph.input} | {
        name for node in model.graph.node for name in node.output
    }
    for name, elem_type, dims in ports:
        if name in taken:
            raise InputError(f"the graph has a tensor {name!r} of its own; expected that name to be free")
        model.graph.input.append(helper.make_tensor_value_info(name, elem_type, dims))


def without_strength_default(model: ModelProto) -> ModelProto:
    """A copy of a graph in which the strength must be fed; `model` itself where it has no such input.

    Runtimes that know no defaults (TensorRT) take an initializer of an input's name for a constant.
    """
    if all(tensor.name != STRENGTH_INPUT for tensor in model.graph.initializer):
        return model
    required = ModelProto()
    required.CopyFrom(model)
    kept = [tensor for tensor in required.graph.initializer if tensor.name != STRENGTH_INPUT]
    del required.graph.initializer[:]
    required.graph.initializer.extend(kept)
    return required


def _batch_dimension(model: ModelProto) -> str | int:
    """The first dimension of the inputs, by its symbol, so that all that is fed agrees."""
    for value in model.graph.input:
        if (
            value.name in ("inputs_embeds", "input_ids", "attention_mask")
            and value.type.tensor_type.shape.dim
        ):
            dim = value.type.tensor_type.shape.dim[0]
            return int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param) or "batch"
    return "batch"


def steering_inputs_of(model: ModelProto) -> SteeringInputs:
    """What a steered graph is told at run time, as its inputs and its mask of last positions show it."""
    nodes = [node for scope in decoder_scopes(model) for node in scope.graph(model).node]
    by_column = any(node.name == LAST_NODE and node.op_type == "Sub" for node in nodes)
    return inputs_told(model, LastFrom.SEQUENCE if by_column else LastFrom.ATTENTION_MASK)


def _refuse_steered(model: ModelProto) -> None:
    names = [tensor.name for tensor in model.graph.initializer]
    names += [name for node in model.graph.node for name in (node.name, *node.output)]
    taken = [name for name in names if name.startswith(STEERING_PREFIX)]
    if taken:
        raise InputError(
            f"the graph is steered already: it holds {sorted(taken)[0]!r}; patch the unsteered graph instead, or "
            "use --replace"
        )


class _Insertion:
    """The edits of a plan going into one scope of a graph."""

    def __init__(
        self, scope: Scope, stream: ResidualStream, plan: SteeringPlan, inputs: SteeringInputs, opset: int
    ) -> None:
        self._scope, self._stream, self._plan = scope, stream, plan
        self._inputs, self._opset = inputs, opset
        self._names = edit_names(plan.edits)
        self._anchors = by_anchor(stream, plan)
        self._selections: tuple[Selection, ...] = ()

    def insert(self, model: ModelProto) -> list[InsertedEdit]:
        """Insert every edit; what was inserted, in the plan's order."""
        graph = self._scope.graph(model)
        index = self._scope.index(model)
        choices = self._choices(index)
        split = [anchor for anchor in self._anchors if not self._on_bias(anchor, choices)]
        split_in_place(graph, model.graph, split)
        index = self._scope.index(model)
        for anchor in split:
            self._check_anchor(index, anchor)
        splices = [self._shared(index, choices)]
        inserted: list[InsertedEdit] = []
        for anchor, numbers in self._anchors.items():
            splice, records = self._edits_at(anchor, numbers, choices, index)
            splices.append(splice)
            inserted += records
        _apply(graph, model.graph, index, splices)
        return sorted(inserted, key=lambda edit: edit.number)

    def _choices(self, index: GraphIndex) -> dict[int, Choice]:
        """The form of every edit."""
        return {
            number: choose(
                self._plan.edits[number],
                alone=len(numbers) == 1,
                baked=self._inputs.strength is None,
                is_float32=StreamType(self._stream.elem_type_of(anchor)).is_float32,
                index=index,
                anchor=anchor,
            )
            for anchor, numbers in self._anchors.items()
            for number in numbers
        }

    def _on_bias(self, anchor: str, choices: Mapping[int, Choice]) -> bool:
        return any(
            choices[number].form in (Form.NORM_BIAS, Form.PROJECTION_BIAS) for number in self._anchors[anchor]
        )

    def _check_anchor(self, index: GraphIndex, anchor: str) -> None:
        if anchor not in index.producer and anchor not in index.inputs:
            raise UnsupportedError(
                f"the stream tensor {anchor!r} is computed inside a function of the file, where it cannot be edited; "
                "inline the file's functions first (onnx.inliner.inline_local_functions) and patch the result"
            )

    def _shared(self, index: GraphIndex, choices: Mapping[int, Choice]) -> _Splice:
        """What edits share, behind the start of the stream, whose shape it reads; where that is inside a function,
        behind the first tensor that is edited.

        An edit at that very tensor renames what its producer computes.
        """
        anchor = self._stream.blocks[0].input
        if anchor not in index.producer and anchor not in index.inputs:
            anchor = min(self._anchors, key=lambda name: index.producer.get(name, -1))
        edited = anchor in self._anchors and not self._on_bias(anchor, choices)
        renamed = edited and anchor in index.producer
        mask = None if self._stream.attention_mask is None else gs.Variable(self._stream.attention_mask)
        caches = cache_inputs(index)
        shared = share(
            self._plan.edits,
            self._inputs,
            Around(
                hidden=gs.Variable(UNSTEERED_PREFIX + anchor if renamed else anchor),
                attention_mask=mask,
                cache=gs.Variable(caches[0]) if caches else None,
                opset=self._opset,
            ),
        )
        self._selections = shared.selections
        graph = _export(shared.nodes, self._opset)
        return _Splice(anchor, graph.node, graph.initializer)

    def _edits_at(
        self, anchor: str, numbers: Sequence[int], choices: Mapping[int, Choice], index: GraphIndex
    ) -> tuple[_Splice, list[InsertedEdit]]:
        stream = StreamType(self._stream.elem_type_of(anchor))
        if stream.elem_type == TensorProto.BFLOAT16 and self._opset < BFLOAT16_OPSET:
            raise UnsupportedError(
                f"the graph's opset is {self._opset}; a bfloat16 stream needs at least {BFLOAT16_OPSET}; "
                "export it again"
            )
        if self._on_bias(anchor, choices):
            return self._onto_bias(anchor, numbers[0], choices[numbers[0]], index)
        is_input = anchor not in index.producer
        hidden = gs.Variable(anchor if is_input else UNSTEERED_PREFIX + anchor, dtype=stream.numpy_dtype)
        nodes, records = [], []
        for number in numbers:
            lowered = lower(
                self._plan.edits[number], self._names[number], hidden, stream, self._selections[number]
            )
            hidden = lowered.output
            nodes += lowered.nodes
            records.append(self._record(number, anchor, choices[number], lowered))
        hidden.name = STEERED_PREFIX + anchor if is_input else anchor
        graph = _export(nodes, self._opset)
        return _Splice(anchor, graph.node, graph.initializer), records

    def _onto_bias(
        self, anchor: str, number: int, choice: Choice, index: GraphIndex
    ) -> tuple[_Splice, list[InsertedEdit]]:
        """An edit at all positions as a bias that is added to the stream anyway."""
        edit, name, node = self._plan.edits[number], self._names[number], choice.node
        assert isinstance(edit, Add)  # noqa: S101 - only these get a bias form
        assert node is not None  # noqa: S101
        if choice.form is Form.NORM_BIAS:
            vector = f"{name}.vector"
            constant = helper.make_tensor(
                vector, TensorProto.FLOAT, edit.vector.shape, scaled_vector(edit).tobytes(), raw=True
            )
            record = self._record(number, anchor, choice, Lowered([], gs.Variable(vector)), (vector,))
            return _Splice(anchor, (), (constant,), appended=((node.output[0], vector),)), [record]
        bias = bias_of(index, node)
        lowered = lower_onto_bias(edit, name, gs.Variable(bias, dtype=np.float32))
        graph = _export(lowered.nodes, self._opset)
        renames = ((node.output[0], bias, lowered.output.name),)
        before = next(name for name in node.input if name != bias)
        splice = _Splice(before, graph.node, graph.initializer, renames=renames)
        return splice, [self._record(number, anchor, choice, lowered)]

    def _record(
        self, number: int, anchor: str, choice: Choice, lowered: Lowered, constants: tuple[str, ...] = ()
    ) -> InsertedEdit:
        edit = self._plan.edits[number]
        own = [
            tensor.name for node in lowered.nodes for tensor in node.inputs if isinstance(tensor, gs.Constant)
        ]
        return InsertedEdit(
            number=number,
            layer=edit.layer,
            site=edit.site,
            op=edit.op,
            positions=edit.positions.value,
            strength=float(edit.strength),
            anchor=anchor,
            form=choice.form,
            why=choice.why,
            nodes=tuple(node.name for node in lowered.nodes),
            constants=constants or tuple(dict.fromkeys(own)),
            scope=str(self._scope),
        )


def _export(nodes: Sequence[gs.Node], opset: int) -> GraphProto:
    """Nodes and their constants as protobufs; what no node computes is taken as given."""
    computed = {id(tensor) for node in nodes for tensor in node.outputs}
    read = {tensor.name: tensor for node in nodes for tensor in node.inputs}
    given = [t for t in read.values() if id(t) not in computed and not isinstance(t, gs.Constant)]
    exported: ModelProto = gs.export_onnx(
        gs.Graph(nodes=list(nodes), inputs=given, opset=opset), do_type_check=False
    )
    return exported.graph


def _apply(graph: GraphProto, outermost: GraphProto, index: GraphIndex, splices: Sequence[_Splice]) -> None:
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
