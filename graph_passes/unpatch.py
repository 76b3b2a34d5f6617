"""`unpatch`: take the steering out of a graph again; what is left is the graph that was patched, field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import GraphProto, ModelProto

from calibration.errors import InputError
from graph_passes.checks import STEERING_INPUTS
from graph_passes.fused_norms import join_fused_norms
from graph_passes.graph_index import rename_reads
from graph_passes.names import STEERED_PREFIX, STEERING_PREFIX, UNSTEERED_PREFIX, edit_of, is_steering
from graph_passes.opened_calls import close_calls
from graph_passes.plan_names import CONSTANTS_KEY, PLAN_KEY
from graph_passes.scopes import decoder_scopes
from graph_passes.selection import STRENGTH_INPUT
from graph_passes.well_formed import check_well_formed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def unpatch_model(model: ModelProto) -> ModelProto:
    """A copy of a steered graph without its steering, equal to the graph before `patch`; `model` is left as it is.

    Nodes, constants and tensors are told by the names that `patch` gave them. Raises `InputError` when the graph
    holds no steering, or was altered since so that what is left would not be whole.
    """
    if not is_steered(model):
        raise InputError("the graph holds no steering to take out")
    original = ModelProto()
    original.CopyFrom(model)
    scopes = decoder_scopes(original)
    for scope in scopes:
        _restore(scope.graph(original))
    graph = original.graph
    _keep(graph.initializer, lambda tensor: not _is_ours(tensor.name))
    _keep(graph.input, lambda value: value.name not in STEERING_INPUTS)
    _keep(original.metadata_props, lambda entry: entry.key not in (PLAN_KEY, CONSTANTS_KEY))
    try:
        check_well_formed(original)
        for scope in scopes:
            scope.index(original)
    except InputError as error:
        raise InputError(
            f"the graph was altered after patching, and is not whole without its steering: {error}"
        ) from None
    return original


def is_steered(model: ModelProto) -> bool:
    """Whether a graph holds anything that `patch` names."""
    return any(_is_ours(tensor.name) for tensor in model.graph.initializer) or any(
        is_steering(node) for scope in decoder_scopes(model) for node in scope.graph(model).node
    )


def _restore(graph: GraphProto) -> None:
    """Drop inserted nodes and undo every renaming in one graph."""
    biases = {
        node.output[0]: node.input[0]
        for node in graph.node
        if is_steering(node)
        and node.op_type == "Add"
        and edit_of(node.output[0])
        and node.output[0].endswith(".bias")
    }
    _keep(graph.node, lambda node: not is_steering(node))
    for node in graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = name.removeprefix(UNSTEERED_PREFIX)
        if node.input and edit_of(node.input[-1]) and node.input[-1].endswith(".vector"):
            node.input.pop()
        for name in list(node.input):
            if name in biases:
                rename_reads(node, name, biases[name])
            elif name.startswith(STEERED_PREFIX):
                rename_reads(node, name, name.removeprefix(STEERED_PREFIX))
    join_fused_norms(graph)
    close_calls(graph)
    _keep(graph.value_info, lambda value: not value.name.startswith(STEERING_PREFIX))


def _is_ours(name: str) -> bool:
    return name.startswith(STEERING_PREFIX) or name == STRENGTH_INPUT


def _keep(entries: Any, wanted: Callable[[Any], bool]) -> None:
    """Delete from a repeated field what is not wanted; nothing is copied where nothing is deleted."""
    for position in reversed(range(len(entries))):
        if not wanted(entries[position]):
            del entries[position]
