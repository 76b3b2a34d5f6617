"""The commands for single steps: calibrate, export, patch, inspect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.lalm import Lalm
from calibration.plan import SteeringPlan
from engines.onnxruntime_runner import OnnxRuntimeRunner
from sarsteer_export import CalibrationSettings, SteeringSettings, calibrate
from sarsteer_export.bundle.manifest import AUDIO_ENCODER, PLAN, STEERED_DECODER
from sarsteer_export.cli.options import parse_layers
from tests import tiny_lalm
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs


def test_calibrate_writes_the_plan_of_the_api_and_says_what_is_in_it(
    inputs: Inputs, lalm: Lalm, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "plan.safetensors"
    given = (
        "--alpha",
        "0.3",
        "--rank",
        "2",
        "--lambda",
        "0.8",
        "--refusal-prompt",
        "No.",
        "--layers",
        "1-2,0",
    )
    found = answered_json(sarsteer("calibrate", inputs.model, *inputs.data, "-o", output, *given, "--json"))
    steering = SteeringSettings(alpha=0.3, ablation=0.8, rank=2, layers=(1, 2, 0))
    wanted = calibrate(
        lalm, inputs.harmful, inputs.benign, CalibrationSettings(steering, refusal_prompt="No.")
    )
    plan = SteeringPlan.load(output)
    assert plan == wanted
    assert [edit.layer for edit in plan.edits] == [1, 2, 0]
    assert {edit.strength for edit in plan.edits} == {0.3}
    assert found["sha256"] == plan.digest()
    assert found["edits"] == 3
    norms = {str(edit.layer): float(np.linalg.norm(edit.tensors()["vector"])) for edit in plan.edits}
    assert found["vector_norms"] == pytest.approx(norms)
    assert found["provenance"] == dict(plan.provenance)
    assert list(listing(tmp_path)) == ["new", "new/plan.safetensors"]


def test_calibrate_prints_a_line_a_block(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "plan.safetensors"
    lines = answered(sarsteer("calibrate", inputs.model, *inputs.data, "-o", output)).splitlines()
    assert [line[:9] for line in lines] == ["block   0", "block   1", "block   2", "3 edits -"]
    assert str(output) in lines[-1]


def test_calibrate_overwrites_only_when_told_to(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "plan.safetensors"
    output.write_text("precious", encoding="utf-8")
    given = ("calibrate", inputs.model, *inputs.data, "-o", output)
    refused(sarsteer(*given), str(output), "exists", "--overwrite")
    assert output.read_text(encoding="utf-8") == "precious"
    answered(sarsteer(*given, "--overwrite"))
    assert len(SteeringPlan.load(output).edits) == 3


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", (0,)), ("2,0", (2, 0)), ("1-3", (1, 2, 3)), ("-1", (3,)), (" 0 , -2 ", (0, 2)), ("0-0,3", (0, 3))],
)
def test_layers_are_blocks_and_ranges_with_both_ends(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 4) == layers


def test_layers_work_for_a_checkpoint_whose_config_leaves_the_default_number_of_blocks_out(
    inputs: Inputs, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((inputs.model / "config.json").read_text(encoding="utf-8"))
    for key in ("num_hidden_layers", "layer_types"):
        del config["text_config"][key]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = ("calibrate", model, *inputs.data, "-o", tmp_path / "plan.safetensors", "--layers", "32")
    refused(
        sarsteer(*given), "block 32 does not exist", "32 blocks"
    )  # Qwen2's default, as Qwen2-Audio-7B has


def test_export_writes_three_graphs_under_the_contract_and_nothing_else(
    inputs: Inputs, bundle_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "onnx"
    found = answered_json(sarsteer("export", inputs.model, "-o", output, "--json"))
    names = {
        "decoder": "decoder_model_merged",
        "audio_encoder": "audio_encoder",
        "embed_tokens": "embed_tokens",
    }
    exported = {part: str(output / f"{name}.onnx") for part, name in names.items()}
    assert found == {**exported, "missing": {}}
    files = [file for name in names.values() for file in (f"{name}.onnx", f"{name}.onnx_data")]
    assert sorted(listing(tmp_path)) == sorted(["onnx", *(f"onnx/{file}" for file in files)])
    graph = onnx.load(found["decoder"], load_external_data=False).graph
    caches = [f"{layer}.{kind}" for layer in range(tiny_lalm.LAYERS) for kind in ("key", "value")]
    assert _ports(graph.input) == {
        "inputs_embeds": ["batch", "sequence", 64],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{cache}": ["batch", 2, "past", 16] for cache in caches},
    }
    assert _ports(graph.output) == {
        "logits": ["batch", "sequence", 280],
        **{f"present.{cache}": ["batch", 2, "total", 16] for cache in caches},
    }
    audio = onnx.load(found["audio_encoder"], load_external_data=False).graph
    assert _ports(audio.input) == {
        "input_features": ["clips", 128, 200],
        "feature_attention_mask": ["clips", 200],
    }
    embed = onnx.load(found["embed_tokens"], load_external_data=False).graph
    assert _ports(embed.input) == {"input_ids": ["batch", "sequence"]}
    assert str(Path(__file__).parents[3]).encode() not in Path(found["decoder"]).read_bytes()
    refused(sarsteer("export", inputs.model, "-o", output), "exists", "--overwrite")


def _ports(values: object) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_patch_beside_the_decoder_shares_its_weights(
    decoder_copy: Path, bundle_path: Path, plan: SteeringPlan
) -> None:
    before = listing(decoder_copy.parent)
    output = decoder_copy.with_name("steered.onnx")
    found = answered_json(
        sarsteer("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", output, "--json")
    )
    assert [edit["layer"] for edit in found["edits"]] == [edit.layer for edit in plan.edits]
    assert {edit["strength"] for edit in found["edits"]} == {2.0}
    after = listing(decoder_copy.parent)
    assert after.pop("steered.onnx")
    assert after == before
    assert output.read_bytes() == (bundle_path / STEERED_DECODER).read_bytes()
    with OnnxRuntimeRunner(output):
        pass


def test_patch_to_another_folder_copies_the_weights(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "elsewhere" / "steered.onnx"
    text = answered(sarsteer("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", output))
    assert text.endswith(f"3 edits, 3 blocks -> {output}\n")
    assert len(text.splitlines()) == 4
    (data,) = [file for file in output.parent.iterdir() if file != output]
    assert data.is_file()
    assert not data.is_symlink()
    original = decoder_copy.parent / data.name
    assert data.stat().st_ino != original.stat().st_ino
    assert data.read_bytes() == original.read_bytes()
    with OnnxRuntimeRunner(output):
        pass


def test_patch_replaces_files_only_when_told_to(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    data = next(file.name for file in decoder_copy.parent.iterdir() if file != decoder_copy)
    (folder / data).write_text("precious", encoding="utf-8")
    given = ("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", folder / "steered.onnx")
    before = listing(tmp_path)
    refused(sarsteer(*given), data, "exists", "--overwrite")
    assert listing(tmp_path) == before
    answered(sarsteer(*given, "--overwrite"))
    assert (folder / data).read_bytes() == (decoder_copy.parent / data).read_bytes()
    refused(sarsteer(*given), "steered.onnx", "exists", "--overwrite")


@pytest.mark.parametrize("beside", [True, False])
def test_patch_never_writes_the_graph_over_the_weights(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path, beside: bool
) -> None:
    data = next(file.name for file in decoder_copy.parent.iterdir() if file != decoder_copy)
    output = (decoder_copy.parent if beside else tmp_path) / data
    before = listing(tmp_path)
    given = ("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", output, "--overwrite")
    refused(sarsteer(*given), "external data", "name another output")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["onnx/new.onnx", STEERED_DECODER.as_posix(), "deep/down/in/it/new.onnx"])
def test_patch_writes_nothing_into_a_bundle(
    decoder_copy: Path, bundle_copy: Path, tmp_path: Path, name: str
) -> None:
    """Neither a file of its own nor one that its manifest does not list."""
    before = listing(tmp_path)
    given = ("patch", decoder_copy, "--plan", bundle_copy / PLAN, "-o", bundle_copy / name, "--overwrite")
    refused(sarsteer(*given), f"the bundle {bundle_copy}", "name an output outside the bundle with -o")
    assert listing(tmp_path) == before


def test_patching_a_steered_decoder_again_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    given = (
        "patch",
        bundle_path / STEERED_DECODER,
        "--plan",
        bundle_path / PLAN,
        "-o",
        tmp_path / "twice.onnx",
    )
    refused(sarsteer(*given), "steered already")
    assert listing(tmp_path) == {}


def test_inspect_a_plan(bundle_path: Path, plan: SteeringPlan) -> None:
    found = answered_json(sarsteer("inspect", bundle_path / PLAN, "--json"))
    assert found["kind"] == "plan"
    assert (found["hidden_size"], found["num_layers"]) == (tiny_lalm.WIDTH, tiny_lalm.LAYERS)
    assert found["sha256"] == plan.digest()
    assert [edit["layer"] for edit in found["edits"]] == [0, 1, 2]
    norm = float(np.linalg.norm(plan.edits[1].tensors()["vector"]))
    assert found["edits"][1]["tensors"]["vector"] == {"shape": [tiny_lalm.WIDTH], "norm": pytest.approx(norm)}
    assert found["provenance"]["refusal_prompt"] == "I cannot assist with that."


def test_inspect_an_unsteered_and_a_steered_decoder(
    decoder_folder: Path, bundle_path: Path, plan: SteeringPlan
) -> None:
    unsteered = answered_json(sarsteer("inspect", decoder_folder / "decoder.onnx", "--json"))
    steered = answered_json(sarsteer("inspect", bundle_path / STEERED_DECODER, "--json"))
    for found in (unsteered, steered):
        assert found["kind"] == "onnx"
        assert len(found["stream"]["blocks"]) == tiny_lalm.LAYERS
        assert found["stream"]["hidden_size"] == tiny_lalm.WIDTH
        assert found["inputs"][0]["name"] == "inputs_embeds"
        assert found["external_data"] == [f"{STEERED_DECODER.name}_data"]
    assert unsteered["steering"] == []
    assert unsteered["metadata"]["sarsteer.model_fingerprint"] == plan.model_fingerprint
    assert steered["metadata"]["sarsteer.plan_sha256"] == plan.digest()
    norms = [2.0 * float(np.linalg.norm(edit.tensors()["vector"])) for edit in plan.edits]
    assert [constant["norm"] for constant in steered["steering"]] == pytest.approx(norms)
    text = answered(sarsteer("inspect", decoder_folder / "decoder.onnx"))
    assert "residual stream: 3 blocks of width 64, float32\n" in text
    assert "steering: none\n" in text
    assert "steering: 3 constants\n" in answered(sarsteer("inspect", bundle_path / STEERED_DECODER))


def test_inspect_a_graph_without_a_residual_stream(bundle_path: Path) -> None:
    found = answered_json(sarsteer("inspect", bundle_path / "onnx/embed_tokens.onnx", "--json"))
    assert found["stream"] is None
    assert "no residual stream: " in answered(sarsteer("inspect", bundle_path / "onnx/embed_tokens.onnx"))


def test_inspect_a_bundle(bundle_path: Path, plan: SteeringPlan) -> None:
    found = answered_json(sarsteer("inspect", bundle_path, "--json"))
    assert found["kind"] == "bundle"
    assert found["manifest"]["parity"] == {
        "verdict": "passed",
        "backend": "onnxruntime-cpu",
        "precision": "float32",
    }
    assert found["plan"]["sha256"] == found["manifest"]["plan_sha256"] == plan.digest()
    text = answered(sarsteer("inspect", bundle_path))
    assert "parity: passed on onnxruntime-cpu, float32\n" in text
    assert AUDIO_ENCODER.as_posix() in text
