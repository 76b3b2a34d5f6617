"""What a residual add is, and what it is not: the rule that the chain, the blocks and the candidates share."""

from __future__ import annotations

import pytest
from onnx import NodeProto, TensorProto, helper

from graph_passes.graph_index import GraphIndex
from graph_passes.residual_add import (
    SkipAndBranches,
    come_from,
    feeds_only_a_sum,
    skip_and_branches,
    terms_of,
)
from graph_passes.transparent import reshaped, uncast


def index_of(*nodes: tuple[str, list[str], str]) -> GraphIndex:
    """A graph of inputs x and y and weights w and b; nodes are operator, inputs and output, one each."""
    made = [helper.make_node(op, inputs, [output], name=output) for op, inputs, output in nodes]
    graph = helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")],
        [helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, None)],
        [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("w", "b")],
    )
    return GraphIndex(graph)


def last(index: GraphIndex) -> NodeProto:
    return index.nodes[-1]


BRANCH = ("MatMul", ["x", "w"], "branch")


@pytest.mark.parametrize("inputs", [["x", "branch"], ["branch", "x"]])
def test_the_skip_is_the_term_from_which_the_branch_comes(inputs: list[str]) -> None:
    index = index_of(BRANCH, ("Add", inputs, "sum"))
    assert skip_and_branches(index, last(index), uncast) == SkipAndBranches("x", ("branch",))


def test_a_sum_of_sums_is_one_residual_add() -> None:
    """x + attention + MLP, with a bias: parallel blocks."""
    index = index_of(
        BRANCH,
        ("MatMul", ["x", "b"], "other"),
        ("Add", ["branch", "b"], "biased"),
        ("Add", ["x", "biased"], "inner"),
        ("Add", ["inner", "other"], "sum"),
    )
    assert feeds_only_a_sum(index, index.nodes[3])
    assert terms_of(index, last(index)) == ("x", "branch", "other")
    assert skip_and_branches(index, last(index), uncast) == SkipAndBranches("x", ("branch", "other"))


def test_a_sum_that_something_else_reads_is_no_part_of_another() -> None:
    index = index_of(
        BRANCH,
        ("Add", ["x", "branch"], "inner"),
        ("MatMul", ["inner", "w"], "second"),
        ("Add", ["inner", "second"], "sum"),
    )
    assert not feeds_only_a_sum(index, index.nodes[1])
    assert skip_and_branches(index, last(index), uncast) == SkipAndBranches("inner", ("second",))


@pytest.mark.parametrize(
    ("before", "inputs"),
    [
        (("Relu", ["x"], "branch"), ["x", "branch"]),  # no product on the way
        (("MatMul", ["y", "w"], "branch"), ["x", "branch"]),  # of something else
        (BRANCH, ["branch", "b"]),  # a bias
        (BRANCH, ["x", "x"]),
    ],
)
def test_other_sums_are_no_residual_adds(before: tuple[str, list[str], str], inputs: list[str]) -> None:
    index = index_of(before, ("Add", inputs, "sum"))
    assert skip_and_branches(index, last(index), uncast) is None


@pytest.mark.parametrize(("form", "seen_through"), [("Cast", (uncast, reshaped)), ("Flatten", (reshaped,))])
def test_a_branch_may_read_what_the_skip_is_another_form_of(
    form: str, seen_through: tuple[object, ...]
) -> None:
    index = index_of((form, ["x"], "skip"), BRANCH, ("Add", ["skip", "branch"], "sum"))
    for origin_of in (uncast, reshaped):
        found = skip_and_branches(index, last(index), origin_of)
        assert (found == SkipAndBranches("skip", ("branch",))) is (origin_of in seen_through)
    assert come_from(index, ["branch"], "x")
    assert not come_from(index, ["branch"], "skip")
