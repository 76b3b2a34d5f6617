"""`refit`: swap the steering of a steered graph for that of another plan, touching nothing but constants.

A plan fits when it lowers to exactly the nodes that the graph holds: the same edits in the same order, at
the same places and positions, with constants of the same shapes. Then only the values differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from calibration.errors import InputError
from calibration.plan import Positions, check_plan_fits
from graph_passes.checks import GraphDamagedError
from graph_passes.graph_index import describe
from graph_passes.lowering import StreamType, lower
from graph_passes.names import edit_names, edit_of, is_steering
from graph_passes.patch import patch_model
from graph_passes.plan_names import FINGERPRINT_KEY, metadata, name_plan
from graph_passes.residual_stream import find_residual_streams
from graph_passes.scopes import decoder_scopes
from graph_passes.selection import Selection
from graph_passes.steering_in import edit_initializers
from graph_passes.steering_inputs import steering_inputs_of
from graph_passes.tensor_sizes import type_name
from graph_passes.unpatch import unpatch_model

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray
    from onnx import NodeProto

    from calibration.plan import SteeringPlan

INSTEAD = "patch the unsteered graph instead"


def plan_constants(
    plan: SteeringPlan, elem_type_of: Callable[[str], int], *, baked: bool = True
) -> dict[str, NDArray[Any]]:
    """The constants that a plan lowers to, by name: bit for bit those that insertion writes.

    `elem_type_of`: the ONNX element type of the stream at an edit, asked for by the edit's name
    `sarsteer.{layer}.{site}.{op}.{n}`. `baked`: strengths are constants, not an input. Raises `InputError` when
    a value overflows that type.
    """
    mask = gs.Variable("mask")
    factor = None if baked else gs.Variable("factor")
    constants: dict[str, NDArray[Any]] = {}
    for edit, name in zip(plan.edits, edit_names(plan.edits), strict=True):
        everywhere = baked and edit.positions == Positions.ALL
        selection = Selection(None if everywhere else mask, None, factor)
        for node in lower(edit, name, gs.Variable("hidden"), StreamType(elem_type_of(name)), selection).nodes:
            constants |= {
                tensor.name: tensor.values for tensor in node.inputs if isinstance(tensor, gs.Constant)
            }
    return constants


def refit_model(model: ModelProto, plan: SteeringPlan, *, force: bool = False) -> ModelProto:
    """A copy of a steered graph with the constants of `plan`, and its hash; `model` is left as it is.

    Requires a graph that `patch` steered by a plan of the same edits. Ensures that nothing but the values of
    the steering constants and the metadata entries that name them differs: the result is what patching the
    unsteered graph anew gives. Raises `InputError` when the graph is not steered, or holds other edits than the
    plan, or the plan does not fit the model or, unless `force`, was made for another one.
    """
    present = edit_initializers(model)
    held = _edits_in(model, present)
    if not held:
        raise InputError("the graph holds no steering to refit; steer it with `patch`")
    unsteered = _unsteered(model)
    streams = find_residual_streams(unsteered)
    stream = next(iter(streams.values()))
    check_plan_fits(
        plan,
        hidden_size=stream.hidden_size,
        num_layers=len(stream.blocks),
        fingerprint=metadata(model).get(FINGERPRINT_KEY),
        force=force,
    )
    names = edit_names(plan.edits)
    _check_edits(names, held)
    inputs = steering_inputs_of(model)
    anchors = {
        name: stream.tensor(edit.site, edit.layer) for edit, name in zip(plan.edits, names, strict=True)
    }
    constants = plan_constants(
        plan, lambda name: stream.elem_type_of(anchors[name]), baked=inputs.strength is None
    )
    _check_constants(constants, present)
    anew = patch_model(unsteered, plan, force=force, inputs=inputs).model
    for scope in streams:
        _check_nodes(scope.graph(anew), scope.graph(model))
    _check_readers(model, constants)
    refitted = _with_constants(model, constants, plan.digest())
    _check_refitted(refitted, constants)
    return refitted


def _unsteered(model: ModelProto) -> ModelProto:
    try:
        return unpatch_model(model)
    except InputError as error:
        raise InputError(f"{error}; {INSTEAD}") from None


def _edits_in(model: ModelProto, present: Mapping[str, TensorProto]) -> list[str]:
    """The edits that a graph's nodes and constants belong to, in graph order."""
    nodes = [node.name for scope in decoder_scopes(model) for node in scope.graph(model).node]
    return list(dict.fromkeys(name for name in map(edit_of, (*nodes, *present)) if name is not None))


def _check_edits(wanted: Collection[str], held: Collection[str]) -> None:
    for name in wanted:
        if name not in held:
            raise InputError(
                f"the plan has an edit {name!r} that the graph has not; the graph has {len(held)}, the plan "
                f"{len(wanted)} edits; {INSTEAD}"
            )
    for name in held:
        if name not in wanted:
            raise InputError(
                f"the graph holds an edit {name!r} that the plan has not; to leave it without effect, give the "
                f"plan that edit with strength 0, or {INSTEAD}"
            )


def _check_constants(wanted: Mapping[str, NDArray[Any]], present: Mapping[str, TensorProto]) -> None:
    """The graph holds the plan's constants, of the same shapes and types, and no others."""
    for name in (*wanted, *present):
        if (name in wanted) is not (name in present):
            raise InputError(f"{_odd_constant(name, wanted=name in wanted)}; {INSTEAD}")
    for name, values in wanted.items():
        tensor = present[name]
        if values.shape != tuple(tensor.dims):
            raise InputError(
                f"the constant {name!r} has shape {tuple(tensor.dims)} in the graph and {values.shape} in the "
                f"plan; {INSTEAD}"
            )
        if helper.np_dtype_to_tensor_dtype(values.dtype) != tensor.data_type:
            raise InputError(
                f"the constant {name!r} is {type_name(tensor.data_type)} in the graph; expected "
                f"{values.dtype}; {INSTEAD}"
            )


def _odd_constant(name: str, *, wanted: bool) -> str:
    """Why a constant stands in the graph alone or, when `wanted`, in the plan alone."""
    edit, _, key = name.rpartition(".")
    if key == "nothing":
        graph, plan = ("all", "last") if wanted else ("last", "all")
        return f"edit {edit!r} acts at {graph} positions in the graph and at {plan} in the plan"
    if wanted:
        return f"the plan needs the constant {name!r}, which is no initializer of the graph"
    return f"the graph holds the constant {name!r}, for which the plan has no values"


def _check_nodes(wanted: GraphProto, held: GraphProto) -> None:
    """The nodes of the graph are those of the unsteered graph patched anew, in order and wired alike."""
    others = {node.name: node for node in held.node if is_steering(node)}
    for node in filter(is_steering, wanted.node):
        other = others.pop(node.name, None)
        if other is None:
            raise InputError(
                f"the graph has no node {node.name!r}, so it was altered after patching; {INSTEAD}"
            )
        if node != other:
            raise InputError(
                f"node {node.name!r} is {_call(other)} in the graph and {_call(node)} by the plan; edits of one "
                f"tensor act in another order, or the graph was altered after patching; {INSTEAD}"
            )
    if others:
        raise InputError(
            f"the graph holds {describe(next(iter(others.values())))}, which no edit has; {INSTEAD}"
        )
    if len(wanted.node) != len(held.node):
        raise InputError(
            f"the graph has {len(held.node)} nodes, and {len(wanted.node)} where the plan is patched in; the graph was "
            f"altered after patching; {INSTEAD}"
        )
    for node, other in zip(wanted.node, held.node, strict=True):
        if node != other:
            raise InputError(
                f"{describe(other)} is {_call(other)} in the graph and {_call(node)} where the plan is patched in; the "
                f"graph was altered after patching; {INSTEAD}"
            )


def _call(node: NodeProto) -> str:
    return f"{node.op_type}({', '.join(node.input)}) -> {', '.join(node.output)}"


def _check_readers(model: ModelProto, constants: Collection[str]) -> None:
    """Nothing but its own edit reads a constant, so that new values change nothing else."""
    for scope in decoder_scopes(model):
        index = scope.index(model)
        for name in constants:
            for position in index.consumers[name]:
                node = index.nodes[position]
                if is_steering(node) and edit_of(node.name) != edit_of(name):
                    raise InputError(
                        f"{describe(node)} reads the steering constant {name!r} of another edit or none, so the "
                        f"graph was altered after patching; {INSTEAD}"
                    )


def _with_constants(model: ModelProto, constants: Mapping[str, NDArray[Any]], digest: str) -> ModelProto:
    refitted = ModelProto()
    refitted.CopyFrom(model)
    for name, tensor in edit_initializers(refitted).items():
        for field in ("float_data", "int32_data", "double_data"):  # where others keep what insertion has raw
            tensor.ClearField(field)
        tensor.raw_data = numpy_helper.from_array(constants[name]).raw_data
    name_plan(refitted, digest)
    return refitted


def _check_refitted(model: ModelProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """What the graph holds now, read back, is what the plan needs: as many constants, bit for bit."""
    held = {name: numpy_helper.to_array(tensor) for name, tensor in edit_initializers(model).items()}
    if held.keys() != constants.keys():
        raise GraphDamagedError(f"refitting set {len(held)} constants; the plan has {len(constants)}")
    for name, values in constants.items():
        if held[name].dtype != values.dtype or held[name].tobytes() != np.asarray(values).tobytes():
            raise GraphDamagedError(f"refitting left other values in {name!r} than the plan's")
