"""How an edit becomes graph-surgeon nodes: one function per operation, as `docs/plan.md` defines it.

The first input of every node that carries the stream is the stream, so that the chain can be walked back.
Constants are scaled in float32 and cast once to the stream's dtype.
Dimensions: B batch, S sequence of this forward pass, D width, K rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Edit, Project
from graph_passes.builder import Builder
from graph_passes.tensor_sizes import type_name

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from graph_passes.selection import Selection

NOTHING = "nothing"
"""Key of the scalar that is added or subtracted where an edit does not act."""

STREAM_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
"""Element types that an edit can be lowered to."""


@dataclass(frozen=True)
class StreamType:
    """The element type of the stream, as ONNX numbers it."""

    elem_type: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stream's dtype in numpy (bfloat16 by ml_dtypes). Raises `UnsupportedError` for integers."""
        if self.elem_type not in STREAM_TYPES:
            raise UnsupportedError(
                f"the residual stream is of type {type_name(self.elem_type)}; expected one of "
                f"{', '.join(map(type_name, STREAM_TYPES))}"
            )
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_type))

    @property
    def is_float32(self) -> bool:
        """Whether constants and arithmetic in float32 are in the stream's own type."""
        return self.elem_type == TensorProto.FLOAT

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


def lower(edit: Edit, name: str, hidden: gs.Tensor, stream: StreamType, selection: Selection) -> Lowered:
    """Lower one edit of the stream tensor `hidden` (B, S, D) to nodes, tensors and constants under `name`."""
    build = Builder(name, [])
    if isinstance(edit, Add):
        output = _lower_add(edit, build, hidden, stream, selection)
    else:
        output = _lower_project(edit, build, hidden, stream, selection)
    return Lowered(build.nodes, output)


def lower_onto_bias(edit: Add, name: str, bias: gs.Tensor) -> Lowered:
    """`b + (strength · v)` in float32: an edit at all positions, taken into a bias (D,) that is added to the stream.

    Both are constants, so that a runtime adds them when it loads the graph.
    """
    build = Builder(name, [])
    vector = build.constant("vector", scaled_vector(edit))
    return Lowered(build.nodes, build.node("Add", "bias", [bias, vector], np.float32))


def scaled_vector(edit: Add) -> NDArray[np.float32]:
    """`strength · v` in float32; its zeros are −0: x + (−0) is x for every x, and strength 0 is exact to the bit."""
    scaled_D = np.float32(edit.strength) * edit.vector
    return np.where(scaled_D == 0, np.float32(-0.0), scaled_D)


def _lower_add(
    edit: Add, build: Builder, hidden: gs.Tensor, stream: StreamType, selection: Selection
) -> gs.Variable:
    """`h + (strength · v)`; −0 is added at other positions, which leaves every float as it is."""
    dtype = stream.numpy_dtype
    term: gs.Tensor
    if selection.factor is None:
        term = build.constant("vector", stream.cast(scaled_vector(edit)))
    else:
        vector = build.constant("vector", scaled_vector(edit))
        term = build.node("Mul", "scaled", [selection.factor, vector], np.float32)
        if not stream.is_float32:
            term = build.node("Cast", "narrow", [term], dtype, to=stream.elem_type)
    if selection.mask is not None:
        nothing = build.constant(NOTHING, stream.cast(np.array(-0.0, dtype=np.float32)))
        term = build.node("Where", "select", [selection.mask, term, nothing], dtype)
    return build.node("Add", "add", [hidden, term], dtype)


def _lower_project(
    edit: Project, build: Builder, hidden: gs.Tensor, stream: StreamType, selection: Selection
) -> gs.Variable:
    """`h − strength · U Uᵀ (h − mean)` as two thin float32 products (D·K each), never D·D.

    Where a row is edited at one position, only that position is gathered (B, 1, D) and multiplied.
    """
    dtype = stream.numpy_dtype
    wide = hidden
    if selection.row is not None:
        wide = build.node("GatherND", "gathered", [wide, selection.row], dtype, batch_dims=1)
    if not stream.is_float32:
        wide = build.node("Cast", "widen", [wide], np.float32, to=TensorProto.FLOAT)
    if edit.mean is not None:
        wide = build.node("Sub", "centre", [wide, build.constant("mean", edit.mean)], np.float32)
    basis_DK = build.constant("basis", edit.basis)
    scaled_KD = build.constant(
        "basis_scaled", np.ascontiguousarray((np.float32(edit.strength) * edit.basis).T)
    )
    coordinates = build.node("MatMul", "coordinates", [wide, basis_DK], np.float32)
    delta = build.node("MatMul", "delta", [coordinates, scaled_KD], np.float32)
    if selection.factor is not None:
        delta = build.node("Mul", "scaled", [delta, selection.factor], np.float32)
    if not stream.is_float32:
        delta = build.node("Cast", "narrow", [delta], dtype, to=stream.elem_type)
    if selection.mask is not None:
        nothing = build.constant(NOTHING, stream.cast(np.array(0.0, dtype=np.float32)))
        delta = build.node("Where", "select", [selection.mask, delta, nothing], dtype)
    return build.node("Sub", "subtract", [hidden, delta], dtype)
