"""The facts about a graph that structure is read from, and the graphs that are refused as damaged."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from calibration.errors import InputError, UnsupportedError
from graph_passes.graph_index import GraphIndex, describe, reads, rename_reads, subgraphs

node = helper.make_node


def graph(*nodes: onnx.NodeProto, initializers: tuple[str, ...] = ("w",)) -> onnx.GraphProto:
    value = helper.make_tensor_value_info
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in initializers]
    inputs = [value(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    return helper.make_graph(list(nodes), "g", inputs, [value("z", TensorProto.FLOAT, [1])], tensors)


def branching(then_nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
    output = [helper.make_tensor_value_info(then_nodes[-1].output[0], TensorProto.FLOAT, [1])]
    body = helper.make_graph(then_nodes, "body", [], output)
    return node("If", ["y"], ["z"], name="branch", then_branch=body, else_branch=body)


def test_producers_consumers_and_constants() -> None:
    constant = node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    index = GraphIndex(graph(constant, node("Add", ["x", "c"], ["a"]), node("Mul", ["a", "a"], ["z"])))
    assert index.producer == {"c": 0, "a": 1, "z": 2}
    assert index.consumers["a"] == [2, 2]
    assert index.consumers["x"] == [1]
    assert index.constants == {"w", "c"}
    assert index.inputs == ["x", "y"]
    producer = index.producer_of("a")
    assert producer is not None
    assert producer.op_type == "Add"
    assert index.producer_of("x") is None
    assert index.producer_of("w") is None


def test_an_initializer_that_is_also_an_input_is_a_constant() -> None:
    index = GraphIndex(graph(node("Add", ["x", "y"], ["z"]), initializers=("y",)))
    assert index.inputs == ["x"]
    assert not index.is_computed("y")


def test_ancestors_and_matrix_products_between() -> None:
    index = GraphIndex(
        graph(node("Relu", ["x"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Add", ["b", "y"], ["z"]))
    )
    assert index.ancestors("z") == index.bit("x") | index.bit("y") | index.bit("a") | index.bit(
        "b"
    ) | index.bit("z")
    assert index.ancestors("a") == index.bit("x") | index.bit("a")
    assert index.ancestors("x") == index.bit("x")
    assert index.ancestors("w") == 0
    assert index.ancestors_through_matmul("z") == index.bit("x") | index.bit("a")
    assert index.ancestors_through_matmul("a") == index.ancestors_through_matmul("x") == 0
    assert len({index.bit(name) for name in ("x", "y", "a", "b", "z")}) == 5
    assert index.is_computed("z")
    assert index.is_computed("x")


def test_a_weight_that_is_transposed_first_is_not_computed() -> None:
    index = GraphIndex(graph(node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["z"])))
    assert not index.is_computed("t")
    assert index.is_computed("z")


def test_a_body_reads_what_it_captures_and_not_what_it_computes() -> None:
    branch = branching([node("Relu", ["x"], ["inner"]), node("Mul", ["inner", "w"], ["out"])])
    assert set(reads(branch)) == {"y", "x", "w"}
    assert len(subgraphs(branch)) == 2
    index = GraphIndex(graph(branch))
    assert index.consumers["x"]
    assert index.ancestors("z") & index.bit("x")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Add", ["x", "nowhere"], ["z"], name="n")], "node Add 'n' reads 'nowhere'"),
        ([node("Relu", ["a"], ["z"]), node("Relu", ["x"], ["a"])], "node Relu -> z reads 'a'"),
        ([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])], "reads 'b'"),
        ([node("Relu", ["x"], ["z"]), node("Relu", ["x"], ["z"])], "tensor 'z' is defined twice"),
        ([node("Relu", ["x"], ["y"])], "tensor 'y' is defined twice"),
        ([node("Relu", ["x"], ["w"])], "tensor 'w' is defined twice"),
        ([branching([node("Relu", ["nowhere"], ["out"])])], "node If 'branch' reads 'nowhere'"),
    ],
    ids=["undefined", "order", "cycle", "twice", "over an input", "over a weight", "in a body"],
)
def test_a_damaged_graph_is_refused(nodes: list[onnx.NodeProto], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphIndex(graph(*nodes))


def test_optional_inputs_and_outputs_are_skipped() -> None:
    index = GraphIndex(graph(node("Clip", ["x", "", "w"], ["z", ""])))
    assert index.producer == {"z": 0}


def test_rename_reads_touches_one_name_only() -> None:
    add = node("Add", ["x", "y", "x"], ["z"])
    rename_reads(add, "x", "n")
    assert list(add.input) == ["n", "y", "n"]


def test_a_captured_tensor_cannot_be_renamed() -> None:
    with pytest.raises(UnsupportedError, match="If 'branch': its body captures 'x'"):
        rename_reads(branching([node("Relu", ["x"], ["out"])]), "x", "n")


def test_nodes_are_described_by_name_or_by_output() -> None:
    assert describe(node("Add", ["x", "y"], ["z"], name="n")) == "Add 'n'"
    assert describe(node("Split", ["x"], ["a", "b"])) == "Split -> a, b"
