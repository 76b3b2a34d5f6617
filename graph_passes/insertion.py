"""Insert the edits of a plan into a decoder graph.

Edits are built with graph-surgeon as one small graph per stream tensor and then spliced into the original
protobuf: a steered tensor keeps its name, what its producer computes is renamed, and the inserted nodes
stand right behind it. Whoever reads the tensor, the next norm, the next residual add or a graph output of
that name, reads the edited one. Nothing else of the file is rewritten, so nothing else can be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto, helper

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Site, SteeringPlan
from graph_passes.attention import cache_inputs
from graph_passes.checks import STEERING_INPUTS
from graph_passes.forms import Choice, Form, bias_of, choose
from graph_passes.fused_norms import split_in_place
from graph_passes.lowering import Lowered, StreamType, lower, lower_onto_bias, scaled_vector
from graph_passes.names import STEERED_PREFIX, STEERING_PREFIX, UNSTEERED_PREFIX, edit_names
from graph_passes.opened_calls import calls_in_the_way, open_calls
from graph_passes.residual_stream import ResidualStream, find_residual_streams
from graph_passes.scopes import Scope, decoder_scopes
from graph_passes.selection import (
    Around,
    Selection,
    SteeringInputs,
    share,
)
from graph_passes.splices import Splice, apply_splices, export_nodes
from graph_passes.steering_inputs import add_steering_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from graph_passes.graph_index import GraphIndex

MINIMUM_OPSET = 13
"""Squeeze and Unsqueeze take their axes as inputs from this opset on."""
BFLOAT16_OPSET = 16
"""Where takes bfloat16 from this opset on."""


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


def _refuse_steered(model: ModelProto) -> None:
    """Raise `InputError` for a graph that holds any name of ours: taking the steering out would take that along."""
    graphs = {str(scope): scope.graph(model) for scope in (Scope(), *decoder_scopes(model))}
    names = [name for graph in graphs.values() for name in _names_in(graph)]
    if own := [name for name in names if name in STEERING_INPUTS]:
        raise InputError(f"the graph has a tensor {own[0]!r} of its own; expected that name to be free")
    taken = [name for name in names if name.startswith(STEERING_PREFIX)]
    if taken:
        raise InputError(
            f"the graph is steered already: it holds {sorted(taken)[0]!r}; patch the unsteered graph instead, or "
            "use --replace"
        )


def _names_in(graph: GraphProto) -> Iterator[str]:
    for entries in (graph.initializer, graph.input, graph.output, graph.value_info):
        yield from (entry.name for entry in entries)
    for node in graph.node:
        yield from (node.name, *node.output)
        yield from (entry.key for entry in node.metadata_props)


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
        apply_splices(graph, model.graph, index, splices)
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

    def _shared(self, index: GraphIndex, choices: Mapping[int, Choice]) -> Splice:
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
        graph = export_nodes(shared.nodes, self._opset)
        return Splice(anchor, graph.node, graph.initializer)

    def _edits_at(
        self, anchor: str, numbers: Sequence[int], choices: Mapping[int, Choice], index: GraphIndex
    ) -> tuple[Splice, list[InsertedEdit]]:
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
        graph = export_nodes(nodes, self._opset)
        return Splice(anchor, graph.node, graph.initializer), records

    def _onto_bias(
        self, anchor: str, number: int, choice: Choice, index: GraphIndex
    ) -> tuple[Splice, list[InsertedEdit]]:
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
            return Splice(anchor, (), (constant,), appended=((node.output[0], vector),)), [record]
        bias = bias_of(index, node)
        lowered = lower_onto_bias(edit, name, gs.Variable(bias, dtype=np.float32))
        graph = export_nodes(lowered.nodes, self._opset)
        renames = ((node.output[0], bias, lowered.output.name),)
        before = next(name for name in node.input if name != bias)
        splice = Splice(before, graph.node, graph.initializer, renames=renames)
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
