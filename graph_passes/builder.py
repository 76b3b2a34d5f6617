"""Nodes and constants of one lowering, collected under one name prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Builder:
    """Appends nodes to `nodes`; a node, its output and the constants it reads are named `{name}.{key}`."""

    def __init__(self, name: str, nodes: list[gs.Node]) -> None:
        self.name = name
        self.nodes = nodes

    def constant(self, key: str, values: NDArray[Any]) -> gs.Constant:
        """A constant of the graph."""
        return gs.Constant(f"{self.name}.{key}", values)

    def integers(self, key: str, values: int | list[int]) -> gs.Constant:
        """An int64 constant: a scalar, or (n,)."""
        return self.constant(key, np.array(values, dtype=np.int64))

    def node(self, op: str, key: str, inputs: list[gs.Tensor], dtype: Any, **attributes: Any) -> gs.Variable:
        """A node with one output, which is returned."""
        output = gs.Variable(f"{self.name}.{key}", dtype=dtype)
        self.nodes.append(
            gs.Node(op, f"{self.name}.{key}", attrs=attributes, inputs=inputs, outputs=[output])
        )
        return output
