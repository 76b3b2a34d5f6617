"""The inputs and outputs of a graph, as people and other programs read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.tensor_sizes import type_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx import ModelProto, ValueInfoProto


@dataclass(frozen=True)
class Port:
    """A graph input or output: name, ONNX element type by name, dimensions (numbers or symbols)."""

    name: str
    elem_type: str
    dims: tuple[int | str, ...]

    @property
    def signature(self) -> str:
        """Element type and dimensions, as `float [batch, sequence, 64]`."""
        return f"{self.elem_type.lower()} [{', '.join(map(str, self.dims))}]"

    def __str__(self) -> str:
        return f"{self.name}: {self.signature}"


def graph_inputs(model: ModelProto) -> tuple[Port, ...]:
    """The graph's inputs, initializers left out."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return _ports(value for value in model.graph.input if value.name not in constants)


def graph_outputs(model: ModelProto) -> tuple[Port, ...]:
    """The graph's outputs."""
    return _ports(model.graph.output)


def _ports(values: Iterable[ValueInfoProto]) -> tuple[Port, ...]:
    return tuple(
        Port(
            value.name,
            type_name(value.type.tensor_type.elem_type),
            tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    )
