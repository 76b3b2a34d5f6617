"""Constants followed into TensorRT's parsed network, and graphs that its parser refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import EngineError, InputError, UnsupportedError
from engines.backends import BACKENDS
from engines.trt.network import Network, RequiredConstant, parse, require_constants

RTX = BACKENDS["tensorrt-rtx"]
VECTOR = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)


def graph(*nodes: onnx.NodeProto, vector: np.ndarray = VECTOR) -> onnx.ModelProto:
    """A graph over `x` (batch, 4) with the constants `steer.vector` and `other` (same values)."""
    body = helper.make_graph(
        list(nodes),
        "toy",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("pick", TensorProto.BOOL, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(vector, "steer.vector"), numpy_helper.from_array(VECTOR, "other")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


WHERE = helper.make_node("Where", ["pick", "steer.vector", "other"], ["term"], name="where")
ADD = helper.make_node("Add", ["x", "term"], ["y"], name="add")


@pytest.fixture
def parsed(tmp_path: Path) -> Callable[[onnx.ModelProto], Network]:
    def parse_graph(model: onnx.ModelProto) -> Network:
        path = tmp_path / "toy.onnx"
        onnx.save(model, path)
        return parse(path, RTX)

    return parse_graph


def needed(consumer: str = "ELEMENTWISE SUM", values: np.ndarray = VECTOR) -> tuple[RequiredConstant, ...]:
    return (RequiredConstant("steer.vector", values, consumer),)


def test_a_constant_is_found_through_broadcast_and_selection(parsed: Callable[..., Network]) -> None:
    (found,) = require_constants(parsed(graph(WHERE, ADD)), needed())
    assert (found.name, found.dtype, found.shape) == ("steer.vector", "float32", (4,))
    assert (found.consumer, found.consumer_layer, found.compared) == ("ELEMENTWISE SUM", "add", True)


def test_equal_constants_are_not_merged(parsed: Callable[..., Network]) -> None:
    both = (*needed(), RequiredConstant("other", VECTOR, "ELEMENTWISE SUM"))
    assert [found.name for found in require_constants(parsed(graph(WHERE, ADD)), both)] == [
        "steer.vector",
        "other",
    ]


def test_a_matrix_product_is_a_consumer(parsed: Callable[..., Network]) -> None:
    matrix = np.diag(VECTOR)
    model = graph(helper.make_node("MatMul", ["x", "steer.vector"], ["y"], name="product"), vector=matrix)
    (found,) = require_constants(parsed(model), needed("MATRIX_MULTIPLY", matrix))
    assert found.consumer_layer == "product"


@pytest.mark.parametrize(
    ("nodes", "required", "why"),
    [
        ([helper.make_node("Relu", ["x"], ["y"])], needed(), "no such constant|no ELEMENTWISE SUM layer"),
        (
            [
                WHERE,
                helper.make_node("Add", ["x", "term"], ["unread"]),
                helper.make_node("Relu", ["x"], ["y"]),
            ],
            needed(),
            "no such constant|no ELEMENTWISE SUM layer on the way to an output",
        ),
        ([WHERE, helper.make_node("Mul", ["x", "term"], ["y"])], needed(), "no ELEMENTWISE SUM layer"),
        ([WHERE, helper.make_node("Sub", ["x", "term"], ["y"])], needed(), "no ELEMENTWISE SUM layer"),
        ([WHERE, ADD], needed("MATRIX_MULTIPLY"), "no MATRIX_MULTIPLY layer"),
        ([WHERE, ADD], needed(values=-VECTOR), "its values are not the graph's"),
        ([WHERE, ADD], needed(values=VECTOR.astype(np.float16)), "its values are not the graph's"),
        ([WHERE, ADD], needed(values=VECTOR[:3]), r"shape \(4,\); expected \(3,\)"),
    ],
)
def test_what_did_not_arrive(
    parsed: Callable[..., Network],
    nodes: list[onnx.NodeProto],
    required: tuple[RequiredConstant, ...],
    why: str,
) -> None:
    with pytest.raises(
        EngineError, match=f"'steer.vector' did not reach the tensorrt-rtx network: .*({why})"
    ):
        require_constants(parsed(graph(*nodes)), required)


def test_no_constants_are_required_of_an_unsteered_graph(parsed: Callable[..., Network]) -> None:
    assert require_constants(parsed(graph(WHERE, ADD)), ()) == ()


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    odd = helper.make_node("Frobnicate", ["x"], ["term"], name="blocks.7.mlp", domain="my.ops")
    model = graph(odd, ADD)
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    onnx.save(model, path)
    with pytest.raises(UnsupportedError, match=r"'Frobnicate' of node 0 \('blocks.7.mlp'\) is not supported"):
        parse(path, RTX)


def test_an_invalid_node_is_named_in_one_line(tmp_path: Path) -> None:
    """Of a known operator: what is wrong is the graph, and no other exporter's operators are the remedy."""
    path = tmp_path / "odd.onnx"
    product = helper.make_node("MatMul", ["x", "steer.vector"], ["y"], name="blocks.7.up")
    onnx.save(graph(product, vector=np.ones((3, 5), np.float32)), path)
    with pytest.raises(InputError) as caught:
        parse(path, RTX)
    message = str(caught.value)
    assert "node 0 ('blocks.7.up'), MatMul, is invalid: Invalid Node - blocks.7.up ITensor" in message
    assert "last dimension of input0 = 4 and second to last dimension of input1 = 3" in message
    for needless in ("not supported", "operators", "Cuda", "\n"):
        assert needless not in message


def test_a_node_that_reads_what_nothing_writes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(graph(ADD), path)
    with pytest.raises(InputError, match=r"node 0 \('add'\), Add, is invalid: .*input was not registered"):
        parse(path, RTX)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(graph(WHERE, ADD).SerializeToString()[:100])
    with pytest.raises(InputError, match="not a readable ONNX model; is it truncated"):
        parse(path, RTX)


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(graph(WHERE, ADD), path, save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").unlink()
    with pytest.raises(EngineError, match=r"Failed to import initializer: steer\.vector"):
        parse(path, RTX)


def test_a_graph_in_memory_reads_its_data_beside_the_path(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(graph(WHERE, ADD), path, save_as_external_data=True, location="data", size_threshold=0)
    content = path.read_bytes()
    path.unlink()
    assert require_constants(parse(path, RTX, content), needed())


def test_numeric_strings_become_numbers(tmp_path: Path) -> None:
    model = graph(WHERE, ADD)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "4"
    path = tmp_path / "toy.onnx"
    onnx.save(model, path)
    network = parse(path, RTX)
    assert tuple(network.definition.get_input(0).shape) == (-1, 4)
