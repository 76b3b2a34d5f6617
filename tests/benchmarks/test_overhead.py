"""The overhead benchmark at toy size: what it prints, and that it counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from node_time import steering_nodes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
SIZES = {"blocks": 2, "width": 64, "vocabulary": 50, "positions": 6, "pairs": 3, "decode_pairs": 4}
NODES_PER_EDIT, NODES_PER_MASK = 2, 11


@pytest.fixture(scope="module")
def result() -> Any:
    options = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(SCRIPT), *options, "--threads", "1", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_result_says_what_was_measured_and_by_which_command(result: Any) -> None:
    assert result["settings"] == SIZES | {"threads": 1, "seed": 0}
    assert result["command"] == (
        "python benchmarks/overhead.py --blocks 2 --width 64 --vocabulary 50 --positions 6 --pairs 3 "
        "--decode-pairs 4 --threads 1"
    )
    assert result["decoder"] == {"parameters": parameters(), "edits": 2, "dtype": "float32"}
    assert result["hardware"]["cpu"]
    assert result["hardware"]["cores"] >= 1
    assert {"torch", "transformers", "numpy"} < set(result["versions"])


def parameters() -> int:
    """Weights of 2 blocks of width 64 with 2 heads and 1 KV head, biases of the projections, norms and head."""
    width, inner, key_width = 64, 176, 32
    attention = 2 * width * width + 2 * width * key_width + width + 2 * key_width
    block = attention + 3 * width * inner + 2 * width
    return 2 * block + width + 50 * width


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_latency_and_node_time_are_spreads_of_positive_numbers(result: Any, phase: str) -> None:
    latency, node_time = result["latency"][phase], result["node_time"][phase]
    assert set(latency) == {"unsteered_ms", "steered_ms", "ratio", "noise_ratio"}
    assert set(node_time) == {"total_us", "steering_us", "share", "share_at_most"}
    for spread in (*latency.values(), *node_time.values()):
        assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
    assert node_time["share"]["median"] < 1
    assert node_time["share"]["median"] <= node_time["share_at_most"]["median"]


def test_every_steering_node_is_accounted_for(result: Any) -> None:
    nodes = result["steering_nodes"]
    assert nodes["inserted"] == 2 * NODES_PER_EDIT + NODES_PER_MASK
    assert nodes["left"] == nodes["inserted"]
    assert nodes["absorbed_by"] == 0


def test_memory_is_measured_for_both_decoders(result: Any) -> None:
    assert set(result["peak_rss_bytes"]) == {"unsteered", "steered"}
    for size in result["peak_rss_bytes"].values():
        assert size is None or size > 2**20


def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    constants = [helper.make_tensor("sarsteer.axis", onnx.TensorProto.INT64, [1], [0])]
    return helper.make_graph(nodes, "graph", [], [], constants)


def test_a_node_that_swallowed_a_steering_node_is_found() -> None:
    before = graph(
        helper.make_node("Add", ["x", "y"], ["sarsteer.unsteered.h"], name="residual"),
        helper.make_node("Shape", ["x"], ["sarsteer.shape"], name="sarsteer.shape"),
        helper.make_node("Gather", ["sarsteer.shape", "sarsteer.axis"], ["sarsteer.v"], name="sarsteer.v"),
        helper.make_node("Add", ["sarsteer.unsteered.h", "sarsteer.v"], ["h"], name="sarsteer.add"),
        helper.make_node("Exp", ["h"], ["out"], name="norm"),
    )
    after = graph(
        before.node[0],
        before.node[1],
        before.node[2],
        helper.make_node("AddExp", ["sarsteer.unsteered.h", "sarsteer.v"], ["out"], name="fused"),
        helper.make_node("Gather", ["x", "sarsteer.axis"], ["z"], name="shares a constant"),
    )
    left, absorbed = steering_nodes(before, after)
    assert left == {"sarsteer.shape", "sarsteer.v"}
    assert absorbed == {"fused"}
