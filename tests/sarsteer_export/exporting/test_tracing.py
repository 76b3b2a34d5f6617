"""A traced graph defines everything that it reads, or is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sarsteer_export.exporting.tracing import define_constants


def clamp(*limits: ir.Value) -> ir.Model:
    """A graph of one `Clip` whose limits it does not hold."""
    read = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Clip", [read, *limits])
    return ir.Model(ir.Graph([read], list(node.outputs), nodes=[node], opset_imports={"": 20}), ir_version=10)


def limit(name: str, value: float) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(np.float32(value), name=name))


def test_constants_that_an_optimiser_left_out_become_initializers() -> None:
    low, high = limit("low", -1.0), limit("high", 1.0)
    model = clamp(low, high)
    assert define_constants(model) is None
    assert dict(model.graph.initializers) == {"low": low, "high": high}
    assert define_constants(model) is None


def test_a_tensor_without_a_value_is_named() -> None:
    model = clamp(limit("low", -1.0), ir.Value(name="high"))
    assert define_constants(model) == "high"


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_constant_of_the_name_of_another_is_named(value: float) -> None:
    model = clamp(limit("low", -1.0), limit("low", value))
    assert define_constants(model) == "low"
