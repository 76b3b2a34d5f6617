"""Residual adds that a runtime fused into norms: they are split to the bit, and then steered like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from calibration.errors import UnsupportedError
from calibration.plan import Positions, Site, SteeringPlan
from graph_passes.fused_norms import is_fused, split_fused_norms, sum_name
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from tests.conftest import one_edit
from tests.decoders import (
    TinyDecoder,
    no_past,
    run_graph,
    session,
)

BATCH, SEQUENCE = 2, 5


def test_a_split_graph_computes_the_same_to_the_bit(fused_decoder: TinyDecoder) -> None:
    fused = [node for node in fused_decoder.proto.graph.node if is_fused(node)]
    assert len(fused) == 2 * 3 - 1  # every add but the first, in front of which there is no norm to fuse
    split = split_fused_norms(fused_decoder.proto)
    assert not any(is_fused(node) for node in split.graph.node)
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(BATCH, SEQUENCE, 64, generator=random)
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    feeds = (embeds, mask, mask.cumsum(1) - 1, no_past(BATCH))
    before = run_graph(session(fused_decoder.proto, fused_decoder.path.parent), *feeds)
    after = run_graph(session(split, fused_decoder.path.parent), *feeds)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)


def test_only_the_chosen_sums_are_split_and_the_graph_given_stays_as_it_is(
    fused_decoder: TinyDecoder,
) -> None:
    names = [sum_name(node) for node in fused_decoder.proto.graph.node if is_fused(node)]
    before = fused_decoder.proto.SerializeToString()
    split = split_fused_norms(fused_decoder.proto, {names[1]})
    assert [sum_name(node) for node in split.graph.node if is_fused(node)] == [names[0], *names[2:]]
    assert fused_decoder.proto.SerializeToString() == before
    assert split_fused_norms(fused_decoder.proto, set()) is fused_decoder.proto


def test_a_steered_graph_can_be_read_and_split_further(fused_decoder: TinyDecoder) -> None:
    edit = one_edit("add", Site.BLOCK_OUTPUT, Positions.LAST, width=64, layers=3, layer=0)
    steered = patch_model(fused_decoder.proto, SteeringPlan(64, 3, (edit,))).model
    assert any(is_fused(node) for node in steered.graph.node)
    outputs = [block.output for block in find_residual_stream(fused_decoder.proto).blocks]
    assert [block.output for block in find_residual_stream(steered).blocks] == outputs


@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_the_bias_of_a_fused_node_is_added_after_the_branch(op: str) -> None:
    weights = ["scale"] if "Simplified" in op else ["scale", "shift"]
    random = np.random.default_rng(0)
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, [4], random.standard_normal(4))
        for name in (*weights, "bias")
    ]
    node = helper.make_node(
        op,
        ["x", "branch", *weights, "bias"],
        ["normed", "", "", "sum"],
        name="fused",
        domain="com.microsoft",
        epsilon=1e-5,
    )
    x, branch, normed, total = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 4])
        for name in ("x", "branch", "normed", "sum")
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x, branch], [normed, total], constants),
        opset_imports=opsets,
        ir_version=9,
    )
    feeds = {name: random.standard_normal((2, 3, 4)).astype(np.float32) for name in ("x", "branch")}
    before, after = (session(graph).run(None, feeds) for graph in (model, split_fused_norms(model)))
    for expected, actual in zip(before, after, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_scale_that_is_computed_is_refused() -> None:
    node = helper.make_node("SkipLayerNormalization", ["x", "y", "computed", "shift"], ["n"], name="fused")
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)])
    with pytest.raises(UnsupportedError, match="'fused': its scale is no initializer"):
        split_fused_norms(helper.make_model(graph))
