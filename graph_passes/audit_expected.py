"""What an audit expects of one graph: the steps that a plan lowers to there, by the functions that insertion uses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from calibration.errors import SiteNotFoundError
from calibration.plan import Site, SteeringPlan, check_plan_fits
from graph_passes.attention import cache_inputs
from graph_passes.audit_signature import HIDDEN, Signature, signature_of
from graph_passes.expressions import Constants, Expressions
from graph_passes.insertion import by_anchor
from graph_passes.lowering import StreamType, lower
from graph_passes.names import edit_names
from graph_passes.selection import (
    PROMPT_LENGTHS_INPUT,
    Around,
    LastFrom,
    PromptFrom,
    SteeringInputs,
    share,
)
from graph_passes.steering_inputs import inputs_told

if TYPE_CHECKING:
    from graph_passes.audit_found import FoundStream


class ExpectedEdits:
    """A plan as it must stand in a graph whose stream was found.

    `numbers`: the edits of every stream tensor in the order in which they act. `lost`: those at a final norm that the
    graph has not. Raises `InputError` when the plan is for another shape of model.
    """

    def __init__(self, found: FoundStream, plan: SteeringPlan, last_from: LastFrom | None) -> None:
        stream = found.stream
        check_plan_fits(plan, hidden_size=stream.hidden_size, num_layers=len(stream.blocks))
        self.plan, self._found = plan, found
        self.inputs = _inputs_of(found, plan, last_from)
        self.lost: list[int] = []
        if stream.final_norm_output is None:
            self.lost = [n for n, edit in enumerate(plan.edits) if edit.site is Site.FINAL_NORM_OUTPUT]
            stream = replace(stream, final_norm_output="")
        self.numbers = {tensor: numbers for tensor, numbers in by_anchor(stream, plan).items() if tensor}
        self.signatures = self.lowered(self.inputs)

    def tensor(self, number: int) -> str | None:
        """The stream tensor that an edit acts on; None where the graph has none."""
        edit = self.plan.edits[number]
        try:
            return self._found.stream.tensor(edit.site, edit.layer)
        except SiteNotFoundError:
            return None

    def lowered(self, inputs: SteeringInputs) -> list[Signature]:
        """The signature of every edit, from the nodes that insertion would make."""
        plan, graph, opset = self.plan, self._found.graph, self._found.opset
        caches = cache_inputs(graph.index)
        mask = self._found.stream.attention_mask
        around = Around(
            hidden=gs.Variable(HIDDEN),
            attention_mask=None if mask is None else gs.Variable(mask),
            cache=gs.Variable(caches[0]) if caches else None,
            opset=opset,
        )
        shared = share(plan.edits, inputs, around)
        nodes, outputs = list(shared.nodes), []
        for number, (edit, name) in enumerate(zip(plan.edits, edit_names(plan.edits), strict=True)):
            stream = self._stream_type(number)
            hidden = gs.Variable(f"{HIDDEN} {number}", dtype=stream.numpy_dtype)
            lowered = lower(edit, name, hidden, stream, shared.selections[number])
            nodes += lowered.nodes
            outputs.append(lowered.output.name)
        computed = {id(tensor) for node in nodes for tensor in node.outputs}
        given = {
            tensor.name: tensor
            for node in nodes
            for tensor in node.inputs
            if id(tensor) not in computed and not isinstance(tensor, gs.Constant)
        }
        exported = gs.export_onnx(
            gs.Graph(nodes=nodes, inputs=list(given.values()), opset=opset), do_type_check=False
        ).graph
        constants = Constants({tensor.name: tensor for tensor in exported.initializer})
        known = {name: graph.inputs.get(name, 0) for name in given}
        expressions = Expressions(list(exported.node), constants, known, opset)
        last = {node.output[0]: node for node in exported.node}
        return [
            signature_of(
                expressions, last[output].op_type, last[output].input[0], last[output].input[1], [HIDDEN]
            )
            for output in outputs
        ]

    def _stream_type(self, number: int) -> StreamType:
        """The element type of the stream at an edit."""
        tensor, stream = self.tensor(number), self._found.stream
        return StreamType(stream.elem_type if tensor is None else stream.elem_type_of(tensor))


def _inputs_of(found: FoundStream, plan: SteeringPlan, last_from: LastFrom | None) -> SteeringInputs:
    """What the graph's inputs say that it is told at run time; for the rest, what the plan needs."""
    otherwise = LastFrom.ATTENTION_MASK if found.stream.attention_mask else LastFrom.SEQUENCE
    told = inputs_told(found.graph.model, otherwise)
    counts_steps = any(edit.positions.value.startswith("first") for edit in plan.edits)
    if counts_steps or PROMPT_LENGTHS_INPUT in found.graph.inputs:
        told = replace(told, prompt_from=PromptFrom.INPUT)
    return told if last_from is None else replace(told, last_from=last_from)
