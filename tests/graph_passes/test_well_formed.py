"""What every reader of a graph takes for granted is checked once, when a file is read."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from calibration.errors import InputError, SiteNotFoundError
from graph_passes.names import edit_of
from graph_passes.scopes import inlined
from graph_passes.tensor_types import elem_type_and_width, fixed
from graph_passes.well_formed import check_well_formed


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    return helper.make_model(
        helper.make_graph(nodes, "g", [value], [value]), opset_imports=[helper.make_opsetid("", 17)]
    )


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Add", ["x"], ["y"], "sum"), "Add 'sum' has 1 inputs; expected at least 2"),
        (helper.make_node("Relu", ["x"], [], "r"), "Relu 'r' has 0 outputs; expected at least 1"),
        (
            helper.make_node("SkipLayerNormalization", ["x", "x"], ["y"], "n", domain="com.microsoft"),
            "has 2 inputs; expected at least 3",
        ),
    ],
)
def test_a_node_that_lacks_operands_is_refused(node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_well_formed(model_of(node))
    body = helper.make_graph([node], "body", [], [onnx.ValueInfoProto(name="y")])
    outer = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(InputError, match=message):
        check_well_formed(model_of(outer))


def test_operators_that_onnx_does_not_know_and_own_functions_may_take_what_they_like() -> None:
    model = model_of(
        helper.make_node("Source", [], ["y"], domain="vendor"), helper.make_node("Add", ["x"], ["z"])
    )
    model.functions.append(helper.make_function("", "Add", ["a"], ["b"], [], [helper.make_opsetid("", 17)]))
    check_well_formed(model)


@pytest.mark.parametrize("version", [0, -1, 2**62])
def test_an_opset_that_does_not_exist_is_not_this_check_s_matter(version: int) -> None:
    model = model_of(helper.make_node("Relu", ["x"], ["y"]))
    model.opset_import[0].version = version
    check_well_formed(model)


def test_a_name_that_is_not_utf8_is_refused() -> None:
    raw = model_of(helper.make_node("Relu", ["x"], ["y"], "abc")).SerializeToString()
    damaged = onnx.ModelProto.FromString(raw.replace(b"abc", b"ab\xff"))
    with pytest.raises(InputError, match=r"the name 'ab.*xff', which is not UTF-8"):
        check_well_formed(damaged)


@pytest.mark.parametrize("layer", ["²", "9" * 5000, "", "-1", "٣"])
def test_only_numbers_that_can_be_read_are_layers(layer: str) -> None:
    assert edit_of(f"sarsteer.{layer}.block_output.add.0.vector") is None
    assert fixed(layer) is None


def test_a_graph_whose_shapes_cannot_be_inferred_has_no_width() -> None:
    model = model_of(helper.make_node("Relu", ["x"], ["y"]))
    sparse = model.graph.sparse_initializer.add(dims=[2])  # it has the name of an input that is not sparse
    sparse.values.CopyFrom(helper.make_tensor("x", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1], [0]))
    with pytest.raises(SiteNotFoundError, match="not one fixed number; found none"):
        elem_type_and_width(model, "x", ["y"])


def test_an_initializer_that_is_defined_twice_is_refused() -> None:
    """Runtimes take the first one or the last."""
    model = model_of(helper.make_node("Add", ["x", "w"], ["y"]))
    for values in ([1.0, 2.0], [0.0, 0.0]):
        model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], values))
    with pytest.raises(InputError, match="the initializer 'w' is defined twice"):
        check_well_formed(model)


@pytest.mark.parametrize("in_a_body", [False, True])
def test_a_sparse_initializer_that_hides_another_is_refused(in_a_body: bool) -> None:
    """A runtime would compute with its values, whatever the dense one says."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["w"], ["y"])], "body", [], [onnx.ValueInfoProto(name="y")]
    )
    model = model_of(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]))
    check_well_formed(model)
    graph = model.graph.node[0].attribute[0].g if in_a_body else model.graph
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [1], [9.0]))
    with pytest.raises(InputError, match="'w' is defined twice, once sparse"):
        check_well_formed(model)


def calling(depth: int, *, forever: bool = False) -> onnx.ModelProto:
    """Functions of which each calls the next one twice."""
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(
        model_of(helper.make_node("F0", ["x"], ["y"], domain="own")).graph, opset_imports=opset
    )
    for level in range(depth):
        called = 0 if forever and level == depth - 1 else level + 1
        last = level == depth - 1 and not forever
        nodes = [
            helper.make_node("Relu" if last else f"F{called}", [one], [other], domain="" if last else "own")
            for one, other in (("a", "b"), ("b", "c"))
        ]
        model.functions.append(helper.make_function("own", f"F{level}", ["a"], ["c"], nodes, opset))
    return model


def test_functions_that_stand_for_more_nodes_than_any_decoder_has_are_not_written_out() -> None:
    assert len(inlined(calling(5)).graph.node) == 2**5
    with pytest.raises(InputError, match="stand for more than 100,000 nodes"):
        inlined(calling(40))
    with pytest.raises(InputError, match="call each other more than 100 deep"):
        inlined(calling(1500))
    with pytest.raises(InputError, match=r"the function 'F\d' of the file calls itself"):
        inlined(calling(3, forever=True))
