"""What must hold of a graph after a pass. Each check returns nothing or raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.errors import SiteNotFoundError
from graph_passes.forms import Form
from graph_passes.graph_index import GraphIndex, describe
from graph_passes.names import UNSTEERED_PREFIX, is_steering
from graph_passes.scopes import Scope, decoder_scopes
from graph_passes.selection import POSITIONS_INPUT, PROMPT_LENGTHS_INPUT, STRENGTH_INPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto

    from calibration.plan import SteeringPlan
    from graph_passes.insertion import InsertedEdit

STEERING_INPUTS = frozenset({POSITIONS_INPUT, PROMPT_LENGTHS_INPUT, STRENGTH_INPUT})


class GraphDamagedError(RuntimeError):
    """A pass broke the graph: a defect of this project, never of the input."""


def check_interface(before: ModelProto, after: ModelProto) -> None:
    """The graph's inputs, outputs, opsets, IR version, functions and metadata are those of `before`.

    What steering is told at run time may have been added behind the inputs.
    """
    inputs = [value for value in after.graph.input if value.name not in STEERING_INPUTS]
    pairs = {
        "inputs": (list(before.graph.input), inputs),
        "outputs": (list(before.graph.output), list(after.graph.output)),
        "opsets": (list(before.opset_import), list(after.opset_import)),
        "IR version": (before.ir_version, after.ir_version),
        "functions": (list(before.functions), list(after.functions)),
        "metadata": (list(before.metadata_props), list(after.metadata_props)[: len(before.metadata_props)]),
    }
    for what, (old, new) in pairs.items():
        if old != new:
            raise GraphDamagedError(f"patching changed the graph's {what}")


def check_wiring(model: ModelProto, inserted: Sequence[InsertedEdit]) -> None:
    """The graph is well formed, every edit is read, and nothing but steering reads an unsteered tensor."""
    for scope in decoder_scopes(model):
        index = scope.index(model)
        _check_scope(index, scope, model, [edit for edit in inserted if edit.scope == str(scope)])


def _check_scope(
    index: GraphIndex, scope: Scope, model: ModelProto, inserted: Sequence[InsertedEdit]
) -> None:
    by_name = {node.name: node for node in index.nodes}
    outputs = {value.name for value in scope.graph(model).output}
    for edit in inserted:
        result = by_name[edit.nodes[-1]].output[0] if edit.nodes else edit.constants[0]
        if not index.consumers[result] and result not in outputs:
            raise GraphDamagedError(f"nothing reads the result {result!r} of edit {edit.number}")
        if edit.form in (Form.NORM_BIAS, Form.PROJECTION_BIAS):
            continue  # the stream tensor is the one it was, with another bias in it
        unsteered = edit.anchor if edit.anchor in index.inputs else UNSTEERED_PREFIX + edit.anchor
        for position in index.consumers[unsteered]:
            if not is_steering(index.nodes[position]):
                reader = describe(index.nodes[position])
                raise GraphDamagedError(f"{reader} reads {unsteered!r}, past edit {edit.number}")


def check_count(plan: SteeringPlan, inserted: Sequence[InsertedEdit], scopes: Sequence[Scope]) -> None:
    """As many edits were made in every scope as the plan has, each once."""
    for scope in scopes:
        made = [edit.number for edit in inserted if edit.scope == str(scope)]
        if made != list(range(len(plan.edits))):
            raise SiteNotFoundError(f"the plan has {len(plan.edits)} edits; {len(made)} were made: {made}")
