"""`refit`: swap the steering of a steered graph for that of another plan, touching nothing but constants.

A plan fits when it lowers to exactly the nodes that the graph holds: the same edits in the same order, at
the same places and positions, with constants of the same shapes. Then only the values differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration.errors import InputError
from calibration.plan import check_plan_fits
from graph_passes.checks import GraphDamagedError
from graph_passes.graph_index import GraphIndex, describe
from graph_passes.insertion import by_anchor, edit_names
from graph_passes.lowering import MASK_PREFIX, Stream, lower
from graph_passes.patch import FINGERPRINT_KEY, metadata, name_plan
from graph_passes.residual_stream import STEERED_PREFIX, UNSTEERED_PREFIX, find_residual_stream
from graph_passes.steering_in import edit_initializers, edit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray
    from onnx import NodeProto

    from calibration.plan import SteeringPlan
    from graph_passes.residual_stream import ResidualStream

INSTEAD = "patch the unsteered graph instead"
MASK = f"{MASK_PREFIX}mask"
"""The tensor that edits at last positions select by."""


def plan_constants(plan: SteeringPlan, elem_type_of: Callable[[str], int]) -> dict[str, NDArray[Any]]:
    """The constants that a plan lowers to, by name: bit for bit those that insertion writes.

    `elem_type_of`: the ONNX element type of the stream at an edit, asked for by the edit's name
    `sarsteer.{layer}.{site}.{op}.{n}`. Raises `InputError` when a value overflows that type.
    """
    constants: dict[str, NDArray[Any]] = {}
    for edit, name in zip(plan.edits, edit_names(plan.edits), strict=True):
        stream = Stream(elem_type_of(name), gs.Variable(MASK))
        for node in lower(edit, name, gs.Variable("hidden"), stream).nodes:
            constants |= {
                tensor.name: tensor.values for tensor in node.inputs if isinstance(tensor, gs.Constant)
            }
    return constants


def refit_model(model: ModelProto, plan: SteeringPlan, *, force: bool = False) -> ModelProto:
    """A copy of a steered graph with the constants of `plan`, and its hash; `model` is left as it is.

    Requires a graph that `patch` steered by a plan of the same edits. Ensures that nothing but the values of
    the steering constants and the metadata entries that name them differs. Raises `InputError` when the graph is
    not steered, or holds other edits than the plan, or the plan does not fit the model or, unless `force`,
    was made for another one.
    """
    index = GraphIndex(model.graph)
    present = edit_initializers(model)
    held = _edits_in(index, present)
    if not held:
        raise InputError("the graph holds no steering to refit; steer it with `patch`")
    stream = find_residual_stream(model)
    check_plan_fits(
        plan,
        hidden_size=stream.hidden_size,
        num_layers=len(stream.blocks),
        fingerprint=metadata(model).get(FINGERPRINT_KEY),
        force=force,
    )
    _check_edits(edit_names(plan.edits), held)

    def elem_type_of(name: str) -> int:
        return _elem_type(index, present, name)

    constants = plan_constants(plan, elem_type_of)
    _check_constants(constants, present)
    _check_nodes(index, plan, stream, elem_type_of)
    _check_readers(index, constants)
    refitted = _with_constants(model, constants, plan.digest())
    _check_refitted(refitted, constants)
    return refitted


def _edits_in(index: GraphIndex, present: Mapping[str, TensorProto]) -> list[str]:
    """The edits that a graph's nodes and constants belong to, in graph order."""
    names = [edit_of(name) for name in (*(node.name for node in index.nodes), *present)]
    return list(dict.fromkeys(name for name in names if name is not None))


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


def _elem_type(index: GraphIndex, present: Mapping[str, TensorProto], name: str) -> int:
    """The element type of the stream at an edit, as its constants and casts show it."""
    vector = present.get(f"{name}.vector")
    if vector is not None:
        return int(vector.data_type)
    narrow = index.producer_of(f"{name}.narrow")
    if narrow is None:
        return int(TensorProto.FLOAT)  # an operation that computes in float32 casts where the stream is not
    return int(_attributes(narrow)["to"])


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
                f"the constant {name!r} is {TensorProto.DataType.Name(tensor.data_type)} in the graph; expected "
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


def _check_nodes(
    index: GraphIndex, plan: SteeringPlan, stream: ResidualStream, elem_type_of: Callable[[str], int]
) -> None:
    """The nodes of edits in the graph are exactly those that the plan lowers to, wired alike."""
    names = edit_names(plan.edits)
    held = {node.name: node for node in index.nodes if edit_of(node.name) is not None}
    for anchor, numbers in by_anchor(stream, plan).items():
        hidden = gs.Variable(_unsteered(anchor))
        nodes: list[gs.Node] = []
        for number in numbers:
            known = Stream(elem_type_of(names[number]), gs.Variable(MASK))
            lowered = lower(plan.edits[number], names[number], hidden, known)
            hidden = lowered.output
            nodes += lowered.nodes
        hidden.name = anchor
        for node in nodes:
            _check_node(node, held.pop(node.name, None))
    if held:
        raise InputError(
            f"the graph holds {describe(next(iter(held.values())))}, which no edit has; {INSTEAD}"
        )


def _unsteered(anchor: str) -> str:
    """What the first edit of a tensor reads; a steered graph input keeps its name."""
    graph_input = anchor.removeprefix(STEERED_PREFIX)
    return graph_input if graph_input != anchor else UNSTEERED_PREFIX + anchor


def _check_node(wanted: gs.Node, held: NodeProto | None) -> None:
    if held is None:
        raise InputError(
            f"the graph has no node {wanted.name!r}, so it was altered after patching; {INSTEAD}"
        )
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (wanted.inputs, wanted.outputs))
    same = wanted.op == held.op_type and dict(wanted.attrs) == _attributes(held)
    if not same or inputs != list(held.input) or outputs != list(held.output):
        raise InputError(
            f"node {wanted.name!r} is {held.op_type}({', '.join(held.input)}) -> {', '.join(held.output)} in the "
            f"graph and {wanted.op}({', '.join(inputs)}) -> {', '.join(outputs)} by the plan; edits of one tensor "
            f"act in another order, or the graph was altered after patching; {INSTEAD}"
        )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _check_readers(index: GraphIndex, constants: Collection[str]) -> None:
    """Nothing but its own edit reads a constant, so that new values change nothing else."""
    for name in constants:
        for position in index.consumers[name]:
            if edit_of(index.nodes[position].name) != edit_of(name):
                raise InputError(
                    f"{describe(index.nodes[position])} reads the steering constant {name!r} of another edit or "
                    f"none, so the graph was altered after patching; {INSTEAD}"
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
