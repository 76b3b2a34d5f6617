"""Calls of local functions are opened where they stand in an edit's way, nowhere else, and closed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from calibration.errors import UnsupportedError
from calibration.plan import Add, Positions, Site, SteeringPlan
from graph_passes.opened_calls import OPENED_KEY
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from graph_passes.unpatch import unpatch_model
from tests.conftest import random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, HandDecoder, Variant, hand_decoder, hand_feeds, session
from tests.reference import literally_steered

DOMAIN = "of.this.file"
OUTPUT_ATOL = 2e-5
"""float32 sums in another order than PyTorch's, as in `test_patch.py`."""


def outlined(proto: onnx.ModelProto, first: str, last: str, name: str) -> onnx.ModelProto:
    """A copy in which the nodes from the one that computes `first` to that of `last` are a call of a function."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    nodes = list(copy.graph.node)
    start, end = (next(n for n, node in enumerate(nodes) if name in node.output) for name in (first, last))
    inside = nodes[start : end + 1]
    computed = {name for node in inside for name in node.output}
    read = dict.fromkeys(name for node in inside for name in node.input if name and name not in computed)
    later = {name for node in nodes[end + 1 :] for name in node.input}
    later |= {value.name for value in copy.graph.output}
    given = [name for node in inside for name in node.output if name in later]
    function = helper.make_function(DOMAIN, name, list(read), given, inside, list(copy.opset_import))
    call = helper.make_node(name, list(read), given, domain=DOMAIN, name=f"call_{name}")
    if not any(entry.domain == DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    copy.functions.append(function)
    rewritten = onnx.GraphProto(node=[*nodes[:start], call, *nodes[end + 1 :]])
    del copy.graph.node[:]
    copy.graph.node.extend(rewritten.node)
    return copy


@pytest.fixture
def hand(tmp_path: Path) -> tuple[HandDecoder, onnx.ModelProto]:
    return hand_decoder(Variant(norm="layer"), tmp_path / "model.onnx")


def plan(layer: int, site: Site = Site.BLOCK_OUTPUT) -> SteeringPlan:
    edit = Add(layer, random_vector(HAND_WIDTH, seed=0), site=site, positions=Positions.LAST)
    return SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,))


def around_block_1(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Block 1's output is computed in a function that also computes block 2's first product: it is hidden."""
    blocks = find_residual_stream(proto).blocks
    first = _after(proto, blocks[0].output)
    return outlined(proto, first, blocks[2].output, "around")


def _after(proto: onnx.ModelProto, tensor: str) -> str:
    names = [node.output[0] for node in proto.graph.node]
    return names[names.index(tensor) + 1]


def calls(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.domain == DOMAIN]


def opened(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == OPENED_KEY
    }


def assert_steered(model: HandDecoder, plan: SteeringPlan, steered: onnx.ModelProto) -> None:
    sample = model.sample(seed=5)
    with torch.inference_mode(), literally_steered(model.blocks, model.norm, plan, sample[1]):
        expected = model(*sample)
    got = session(steered).run(None, hand_feeds(steered, sample))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=OUTPUT_ATOL)


def test_a_call_that_hides_the_tensor_is_opened_and_closed(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    model, proto = hand
    source = around_block_1(proto)
    result = patch_model(source, plan(1))
    assert (calls(source), calls(result.model)) == (["call_around"], [])
    assert list(result.model.functions) == list(source.functions)
    assert_steered(model, plan(1), result.model)
    assert unpatch_model(result.model) == source


def test_a_call_that_does_not_stand_in_the_way_stays(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    model, proto = hand
    source = around_block_1(proto)
    for layer in (0, 2):  # given to the call, and given out by it without being read inside
        result = patch_model(source, plan(layer))
        assert calls(result.model) == ["call_around"]
        assert opened(result.model) == set()
        assert_steered(model, plan(layer), result.model)


def test_a_call_that_gives_out_what_it_reads_is_opened(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    """An edit behind the call would not reach the function's own readers."""
    model, proto = hand
    blocks = find_residual_stream(proto).blocks
    start = _after(proto, blocks[0].output)
    end = _after(proto, _after(proto, blocks[1].output))
    source = outlined(proto, start, end, "reads_own")
    assert blocks[1].output in next(node for node in source.graph.node if node.domain == DOMAIN).output
    result = patch_model(source, plan(1))
    assert calls(result.model) == []
    assert_steered(model, plan(1), result.model)
    assert unpatch_model(result.model) == source


def test_functions_in_functions_are_opened_one_by_one(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    model, proto = hand
    blocks = find_residual_stream(proto).blocks
    inner = outlined(
        proto, _after(proto, blocks[0].output), blocks[1].adds[0].split("'")[1] + "_output_0", "inner"
    )
    source = outlined(inner, _first_of(inner), find_residual_stream(proto).blocks[2].output, "outer")
    assert [function.name for function in source.functions] == ["inner", "outer"]
    result = patch_model(source, plan(1))
    (kept,) = calls(result.model)  # the outer one alone was opened
    assert kept.startswith("call_outer/call_inner")
    assert_steered(model, plan(1), result.model)
    assert unpatch_model(result.model) == source


def _first_of(proto: onnx.ModelProto) -> str:
    return next(str(node.output[0]) for node in proto.graph.node if node.domain == DOMAIN)


def test_names_of_an_opened_call_are_free_ones(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    model, proto = hand
    source = around_block_1(proto)
    of_call = next(node for node in patch_model(source, plan(1)).model.graph.node if node.metadata_props)
    taken = of_call.output[0]
    assert taken.startswith("call_around/")
    spare = helper.make_node("Identity", ["attention_mask"], [taken])
    source.graph.node.append(spare)
    result = patch_model(source, plan(1))
    assert_steered(model, plan(1), result.model)
    assert unpatch_model(result.model) == source


def test_a_function_of_another_opset_is_refused(hand: tuple[HandDecoder, onnx.ModelProto]) -> None:
    source = around_block_1(hand[1])
    source.functions[0].opset_import[0].version -= 1
    with pytest.raises(UnsupportedError, match=r"for opset 16 of ai.onnx; expected the graph's, 17"):
        patch_model(source, plan(1))
    assert dataclasses.is_dataclass(patch_model(source, plan(0)))  # nothing has to be opened for this one
