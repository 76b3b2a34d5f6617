"""The benchmark of patching at scale, at toy size: what it prints, and that its decoders are what it says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_passes.residual_stream import SCOPES_KEY, find_residual_stream
from scaled_decoder import SHAPES, ScaledDecoder, export_blocks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "patch_scale.py"
TOY = SHAPES["toy"]
SPREADS = (
    "command_seconds",
    "command_above_imports_bytes",
    "command_read_bytes",
    "patch_seconds",
    "patch_above_imports_bytes",
    "imports_seconds",
    "imports_rss_bytes",
)


@pytest.fixture(scope="module")
def result() -> Any:
    command = [sys.executable, str(SCRIPT), "--shape", "toy", "--runs", "2", "--load-whole", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_result_says_what_was_measured_and_by_which_command(result: Any) -> None:
    assert result["command"] == "python benchmarks/patch_scale.py --shape toy --runs 2 --load-whole"
    assert result["hardware"]["cpu"]
    assert {"python", "onnx", "numpy"} < set(result["versions"])
    toy = result["decoders"]["toy"]
    assert toy["shape"] == dataclasses.asdict(TOY) | {"width": 64}
    assert toy["edits"] == TOY.blocks
    assert toy["data_untouched"] is True


def test_time_and_memory_are_spreads_of_plausible_numbers(result: Any) -> None:
    found = result["decoders"]["toy"]["patching"]
    assert set(found) == set(SPREADS)
    for spread in found.values():
        assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
    assert found["imports_rss_bytes"]["median"] > 2**20
    graph = result["decoders"]["toy"]["graph_bytes"]
    assert graph <= found["command_read_bytes"]["median"] < graph + 200_000, (
        "more was read than the graph and the plan"
    )


def test_loading_whole_is_measured_once(result: Any) -> None:
    whole = result["decoders"]["toy"]["load_whole"]
    assert whole["seconds"] > 0
    assert whole["peak_rss_bytes"] > 2**20


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ScaledDecoder:
    return ScaledDecoder.make(TOY, tmp_path_factory.mktemp("scaled"))


def test_the_data_was_never_written_and_is_as_large_as_the_weights(decoder: ScaledDecoder) -> None:
    found = decoder.data.stat()
    assert found.st_blocks == 0
    width, keys = TOY.width, TOY.kv_heads * TOY.head_width
    block = 2 * width * width + 2 * width * keys + 3 * width * TOY.mlp
    weights = 2 * (TOY.blocks * block + width * TOY.vocabulary)
    assert weights <= found.st_size < weights + 4096 * 8 * TOY.blocks


def test_the_stream_has_every_block_at_its_width(decoder: ScaledDecoder) -> None:
    stream = find_residual_stream(onnx.load(decoder.graph, load_external_data=False))
    assert (len(stream.blocks), stream.hidden_size) == (TOY.blocks, 64)
    assert stream.elem_type == onnx.TensorProto.FLOAT16
    assert stream.final_norm_output is not None


def test_the_graph_is_consistent_in_every_shape_and_runs(decoder: ScaledDecoder) -> None:
    onnx.checker.check_model(decoder.graph)
    onnx.shape_inference.infer_shapes(
        onnx.load(decoder.graph, load_external_data=False), check_type=True, strict_mode=True, data_prop=True
    )
    session = onnxruntime.InferenceSession(decoder.graph, providers=["CPUExecutionProvider"])
    past = np.zeros((1, TOY.kv_heads, 0, TOY.head_width), dtype=np.float16)
    feeds = {
        "inputs_embeds": np.ones((1, 3, 64), dtype=np.float16),
        "attention_mask": np.ones((1, 3), dtype=np.int64),
        "position_ids": np.arange(3, dtype=np.int64)[None],
    }
    feeds |= {f"past_key_values.{n}.{kind}": past for n in range(TOY.blocks) for kind in ("key", "value")}
    outputs = dict(
        zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    assert outputs["logits"].shape == (1, 3, TOY.vocabulary)
    last = TOY.blocks - 1
    assert outputs[f"present.{last}.key"].shape == (1, TOY.kv_heads, 3, TOY.head_width)


def test_repeating_a_block_gives_what_the_exporter_gives_for_so_many_blocks(
    decoder: ScaledDecoder, tmp_path: Path
) -> None:
    exported = export_blocks(TOY, TOY.blocks, tmp_path / "exported.onnx")
    scaled = onnx.load(decoder.graph, load_external_data=False)
    assert operators(scaled) == operators(exported)
    for field in ("initializer", "input", "output", "value_info"):
        assert len(getattr(scaled.graph, field)) == len(getattr(exported.graph, field)), field
    assert [value.name for value in scaled.graph.input] == [value.name for value in exported.graph.input]
    assert [value.name for value in scaled.graph.output] == [value.name for value in exported.graph.output]


def operators(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """Operators by the innermost module that they are in."""
    found: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "[]")
        module = scopes.split("'")[-4] if scopes.count("'") >= 4 else ""
        found[(node.op_type, module)] += 1
    return found
