"""The stream is seen through pairs of QuantizeLinear and DequantizeLinear, and edits stand behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.plan import Add, Positions, SteeringPlan
from graph_passes.names import UNSTEERED_PREFIX
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from tests.conftest import random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder

SCALE = np.float32(0.05)


def quantise(proto: onnx.ModelProto, tensor: str, readers: Sequence[int] | None = None) -> str:
    """Put a Q/DQ pair between a tensor and its readers, or some of them by their order; what they read then."""
    graph = proto.graph
    names = [f"{tensor}.{part}" for part in ("scale", "zero", "q", "dq")]
    graph.initializer.append(numpy_helper.from_array(SCALE, names[0]))
    graph.initializer.append(numpy_helper.from_array(np.uint8(128), names[1]))
    every = [node for node in graph.node if tensor in node.input]
    for node in every if readers is None else [every[number] for number in readers]:
        node.input[:] = [names[3] if name == tensor else name for name in node.input]
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *names[:2]], [names[2]]),
        helper.make_node("DequantizeLinear", [names[2], *names[:2]], [names[3]]),
    ]
    at = next(number for number, node in enumerate(graph.node) if tensor in node.output) + 1
    nodes = [*graph.node[:at], *pair, *graph.node[at:]]
    rewritten = onnx.GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(rewritten.node)
    return names[3]


@pytest.fixture
def proto(tmp_path: Path) -> onnx.ModelProto:
    return hand_decoder(Variant(norm="layer"), tmp_path / "model.onnx")[1]


def test_a_block_ends_behind_the_pairs_that_every_reader_shares(proto: onnx.ModelProto) -> None:
    outputs = [block.output for block in find_residual_stream(proto).blocks]
    behind = [quantise(proto, output) for output in outputs]
    again = quantise(proto, behind[0])
    stream = find_residual_stream(proto)
    assert [block.output for block in stream.blocks] == [again, *behind[1:]]
    assert len(stream.blocks[1].adds) == 2


def test_a_block_whose_readers_differ_ends_before_the_pair(proto: onnx.ModelProto) -> None:
    output = find_residual_stream(proto).blocks[0].output
    quantise(proto, output, readers=[0])
    assert find_residual_stream(proto).blocks[0].output == output


def test_a_block_that_the_graph_gives_out_ends_before_the_pair(proto: onnx.ModelProto) -> None:
    output = find_residual_stream(proto).blocks[0].output
    quantise(proto, output)
    proto.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    assert find_residual_stream(proto).blocks[0].output == output


def test_a_sum_in_parts_is_one_residual_add_through_a_pair(tmp_path: Path) -> None:
    """x + attention, quantised, + MLP of x: parallel blocks."""
    _, proto = hand_decoder(Variant(residual="parallel", norm="layer"), tmp_path / "model.onnx")
    blocks = find_residual_stream(proto).blocks
    adds = {node.output[0]: node for node in proto.graph.node if node.op_type == "Add"}
    inner = next(
        name for name in adds[blocks[1].output].input if name in adds and blocks[0].output in adds[name].input
    )
    quantise(proto, inner)
    assert find_residual_stream(proto).blocks == blocks


def test_an_edit_stands_behind_the_pair_and_the_stream_is_found_again(proto: onnx.ModelProto) -> None:
    behind = quantise(proto, find_residual_stream(proto).blocks[1].output)
    edit = Add(1, random_vector(HAND_WIDTH, seed=0), positions=Positions.LAST)
    result = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,)))
    producer = next(node for node in result.model.graph.node if UNSTEERED_PREFIX + behind in node.output)
    assert producer.op_type == "DequantizeLinear"
    assert find_residual_stream(result.model).blocks == find_residual_stream(proto).blocks
