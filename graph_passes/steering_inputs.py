"""The graph inputs by which a steered decoder is told positions and strength at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto, TensorProto, helper

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Positions
from graph_passes.scopes import decoder_scopes
from graph_passes.selection import (
    LAST_NODE,
    POSITIONS_INPUT,
    PROMPT_LENGTHS_INPUT,
    STRENGTH_INPUT,
    LastFrom,
    PromptFrom,
    SteeringInputs,
    StrengthInput,
)

if TYPE_CHECKING:
    from calibration.plan import SteeringPlan

STRENGTH_ROWS = "steering_rows"
"""Symbol of the strength's rows: the default has one, whatever the batch, and runtimes take equal symbols for equal."""
OVERRIDABLE_IR_VERSION = 4
"""From this IR version on an initializer that is also an input is a default, which a runtime may be fed over."""


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
        ports.append((STRENGTH_INPUT, TensorProto.FLOAT, [STRENGTH_ROWS, *per_edit]))
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
    batch = _batch_dimension(model)
    for value in required.graph.input:
        if value.name == STRENGTH_INPUT:
            rows = value.type.tensor_type.shape.dim[0]
            rows.CopyFrom(
                helper.make_tensor_value_info("", TensorProto.FLOAT, [batch]).type.tensor_type.shape.dim[0]
            )
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


def inputs_told(model: ModelProto, otherwise: LastFrom) -> SteeringInputs:
    """What a graph is told at run time as its inputs show it; without one for positions, the last is `otherwise`."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    strength = None
    if STRENGTH_INPUT in shapes:
        strength = StrengthInput.BATCH if len(shapes[STRENGTH_INPUT]) == 1 else StrengthInput.EDITS
    return SteeringInputs(
        last_from=LastFrom.INPUT if POSITIONS_INPUT in shapes else otherwise,
        prompt_from=PromptFrom.INPUT if PROMPT_LENGTHS_INPUT in shapes else PromptFrom.PAST,
        strength=strength,
    )
