"""Read from a graph what steering it holds, by the names that insertion gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from calibration.errors import InputError
from graph_passes.names import edit_of
from graph_passes.tensor_sizes import tensor_bytes, type_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, TensorProto


@dataclass(frozen=True)
class SteeringConstant:
    """One constant of one edit found in a graph."""

    layer: int
    site: str
    op: str
    name: str
    elem_type: str
    shape: tuple[int, ...]
    norm: float


def edit_initializers(model: ModelProto) -> dict[str, TensorProto]:
    """The initializers of every edit by name, scalars included, in graph order: the graph's own, no copies.

    Raises `InputError` for one whose values are not in the graph but in external data, or are no real numbers.
    """
    found = {tensor.name: tensor for tensor in model.graph.initializer if edit_of(tensor.name) is not None}
    for tensor in found.values():
        if uses_external_data(tensor):
            raise InputError(
                f"the steering constant {tensor.name!r} lies in external data; expected it in the graph itself, "
                "where `patch` puts it; patch the unsteered graph instead"
            )
        if tensor_bytes(tensor) is None or type_name(tensor.data_type).startswith("COMPLEX"):
            raise InputError(
                f"the steering constant {tensor.name!r} is of type {type_name(tensor.data_type)}; expected numbers; "
                "patch the unsteered graph instead"
            )
    return found


def constants_digest(model: ModelProto) -> str:
    """Hex sha256 over name, type, shape and values of every constant of every edit, scalars included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(edit_initializers(model).items()):
        values = numpy_helper.to_array(tensor)
        digest.update(f"{name} {tensor.data_type} {list(tensor.dims)} ".encode() + values.tobytes())
    return digest.hexdigest()


def steering_tensors(model: ModelProto) -> dict[str, NDArray[Any]]:
    """The values of the constants of every edit by name, in graph order: vectors (D,), bases and means.

    Scalars and the constants of the mask of last positions are left out. bfloat16 is ml_dtypes' dtype.
    Raises `InputError` for one in external data.
    """
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in edit_initializers(model).items()
        if tensor.dims
    }


def steering_constants(model: ModelProto) -> tuple[SteeringConstant, ...]:
    """The constants of every edit in a graph: vectors, bases and means, in graph order.

    Raises `InputError` for one in external data.
    """
    found = []
    for name, values in steering_tensors(model).items():
        parts = name.split(".")
        norm = float((values.astype("float64") ** 2).sum() ** 0.5)
        found.append(
            SteeringConstant(int(parts[1]), parts[2], parts[3], name, str(values.dtype), values.shape, norm)
        )
    return tuple(found)
