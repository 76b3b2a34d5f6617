"""How an edit becomes graph-surgeon nodes: one function per operation, as `docs/plan.md` defines it.

The first input of every node that carries the stream is the stream, so that the chain can be walked back.
Constants are scaled in float32 and cast once to the stream's dtype.
Dimensions: B batch, S sequence of this forward pass, T past and present, D width, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from calibration.errors import InputError
from calibration.plan import Add, Edit, Positions, Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK_PREFIX = "sarsteer.last."
INT64_MAX = np.iinfo(np.int64).max
REDUCE_AXES_INPUT_OPSET = 18
"""From this opset on ReduceMax takes its axes as an input; before, as an attribute."""


@dataclass(frozen=True)
class Stream:
    """What lowering must know of the graph: the stream's element type and the mask of last positions.

    `last`: bool (B, S, 1), or None when no edit of the plan needs it.
    """

    elem_type: int
    last: gs.Variable | None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stream's dtype in numpy (bfloat16 by ml_dtypes)."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_type))

    def cast(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """float32 values rounded once to the stream's dtype. Raises `InputError` when one does not fit."""
        with np.errstate(over="ignore"):
            rounded = values.astype(self.numpy_dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise InputError(
                f"a steering constant of magnitude {np.abs(values).max():g} overflows the stream's "
                f"{self.numpy_dtype}; lower the strength"
            )
        return rounded


@dataclass(frozen=True)
class Lowered:
    """The nodes of one edit; the last of them computes the edited stream."""

    nodes: list[gs.Node]
    output: gs.Variable


def lower(edit: Edit, name: str, hidden: gs.Tensor, stream: Stream) -> Lowered:
    """Lower one edit of the stream tensor `hidden` (B, S, D) to nodes, tensors and constants under `name`."""
    if isinstance(edit, Add):
        return _lower_add(edit, name, hidden, stream)
    return _lower_project(edit, name, hidden, stream)


def _lower_add(edit: Add, name: str, hidden: gs.Tensor, stream: Stream) -> Lowered:
    """`h + (strength · v)`; for last positions, −0 is added elsewhere, which leaves every float as it is."""
    build = _Builder(name)
    # Zeros of the vector are stored as −0: x + (−0) is x for every x, and strength 0 is exact to the bit.
    scaled_D = np.float32(edit.strength) * edit.vector
    term = build.constant("vector", stream.cast(np.where(scaled_D == 0, np.float32(-0.0), scaled_D)))
    if edit.positions is Positions.LAST:
        nothing = build.constant("nothing", stream.cast(np.array(-0.0, dtype=np.float32)))
        term = build.node("Where", "select", [stream.last, term, nothing], stream.numpy_dtype)
    output = build.node("Add", "add", [hidden, term], stream.numpy_dtype)
    return Lowered(build.nodes, output)


def _lower_project(edit: Project, name: str, hidden: gs.Tensor, stream: Stream) -> Lowered:
    """`h − strength · U Uᵀ (h − mean)` as two thin float32 products (D·K each), never D·D."""
    build = _Builder(name)
    low_precision = stream.elem_type != TensorProto.FLOAT
    wide = (
        build.node("Cast", "widen", [hidden], np.float32, to=TensorProto.FLOAT) if low_precision else hidden
    )
    if edit.mean is not None:
        wide = build.node("Sub", "centre", [wide, build.constant("mean", edit.mean)], np.float32)
    basis_DK = build.constant("basis", edit.basis)
    scaled_KD = build.constant(
        "basis_scaled", np.ascontiguousarray((np.float32(edit.strength) * edit.basis).T)
    )
    coordinates = build.node("MatMul", "coordinates", [wide, basis_DK], np.float32)
    delta = build.node("MatMul", "delta", [coordinates, scaled_KD], np.float32)
    if low_precision:
        delta = build.node("Cast", "narrow", [delta], stream.numpy_dtype, to=stream.elem_type)
    if edit.positions is Positions.LAST:
        nothing = build.constant("nothing", stream.cast(np.array(0.0, dtype=np.float32)))
        delta = build.node("Where", "select", [stream.last, delta, nothing], stream.numpy_dtype)
    output = build.node("Sub", "subtract", [hidden, delta], stream.numpy_dtype)
    return Lowered(build.nodes, output)


def lower_last_positions(hidden: gs.Tensor, attention_mask: gs.Tensor | None, opset: int) -> Lowered:
    """Mark the last attended position of this forward pass in each row: bool (B, S, 1), once per graph.

    `hidden`: any stream tensor (B, S, D), read for its shape alone. `attention_mask`: (B, T), of which the
    last S columns are this pass; a row that attends to nothing here is marked nowhere. None stands for a
    graph without mask: the last position is then S − 1.
    """
    build = _Builder(MASK_PREFIX.rstrip("."))
    shape = build.node("Shape", "shape", [hidden], np.int64)
    start, end, axis = (
        build.constant(key, np.array([at], dtype=np.int64))
        for key, at in (("from", 1), ("to", 2), ("axis", 0))
    )
    sequence_1 = build.node("Slice", "sequence", [shape, start, end, axis], np.int64)
    zero, one, minus_one = (
        build.constant(key, np.array(at, dtype=np.int64))
        for key, at in (("zero", 0), ("one", 1), ("none", -1))
    )
    sequence = build.node("Squeeze", "length", [sequence_1], np.int64)
    positions_S = build.node("Range", "positions", [zero, sequence, one], np.int64)
    if attention_mask is None:
        last = build.node("Sub", "last", [sequence_1, one], np.int64)
        marked = build.node("Equal", "is_last", [positions_S, last], np.bool_)
        axes = build.constant("as_batch_and_width", np.array([0, 2], dtype=np.int64))
    else:
        window_start = build.node("Neg", "window_start", [sequence_1], np.int64)
        window_end, columns = build.constant("window_end", np.array([INT64_MAX], dtype=np.int64)), start
        window_BS = build.node(
            "Slice", "window", [attention_mask, window_start, window_end, columns], np.int64
        )
        attended_BS = build.node("Cast", "attended", [window_BS], np.bool_, to=TensorProto.BOOL)
        scored_BS = build.node("Where", "scored", [attended_BS, positions_S, minus_one], np.int64)
        if opset >= REDUCE_AXES_INPUT_OPSET:
            last_B1 = build.node("ReduceMax", "last", [scored_BS, columns], np.int64, keepdims=1)
        else:
            last_B1 = build.node("ReduceMax", "last", [scored_BS], np.int64, axes=[1], keepdims=1)
        marked = build.node("Equal", "is_last", [positions_S, last_B1], np.bool_)
        axes = build.constant("as_width", np.array([2], dtype=np.int64))
    output = build.node("Unsqueeze", "mask", [marked, axes], np.bool_)
    return Lowered(build.nodes, output)


class _Builder:
    """Collects the nodes of one lowering under one name prefix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[gs.Node] = []

    def constant(self, key: str, values: NDArray[Any]) -> gs.Constant:
        return gs.Constant(f"{self.name}.{key}", values)

    def node(self, op: str, key: str, inputs: list[gs.Tensor], dtype: Any, **attributes: Any) -> gs.Variable:
        output = gs.Variable(f"{self.name}.{key}", dtype=dtype)
        self.nodes.append(
            gs.Node(op, f"{self.name}.{key}", attrs=attributes, inputs=inputs, outputs=[output])
        )
        return output
