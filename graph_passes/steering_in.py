"""Read from a graph what steering it holds, by the names that insertion gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import numpy_helper

from graph_passes.residual_stream import STEERING_PREFIX

if TYPE_CHECKING:
    from onnx import ModelProto

NAME_PARTS = 6
"""sarsteer . layer . site . op . n . tensor."""


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


def steering_constants(model: ModelProto) -> tuple[SteeringConstant, ...]:
    """The constants of every edit in a graph: vectors, bases and means, in graph order."""
    found = []
    for tensor in model.graph.initializer:
        parts = tensor.name.split(".")
        if not tensor.name.startswith(STEERING_PREFIX) or len(parts) != NAME_PARTS or not tensor.dims:
            continue
        values = numpy_helper.to_array(tensor)
        norm = float((values.astype("float64") ** 2).sum() ** 0.5)
        found.append(
            SteeringConstant(
                int(parts[1]), parts[2], parts[3], tensor.name, str(values.dtype), values.shape, norm
            )
        )
    return tuple(found)
