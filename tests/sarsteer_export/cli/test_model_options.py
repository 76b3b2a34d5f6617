"""`--decoder` and its like, `--adapter` and `--trust-remote-code` on the commands that load a model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from calibration.plan import SteeringPlan
from tests.sarsteer_export.command_line import answered_json, listing, refused, sarsteer
from tests.zoo import kimi_audio

ADAPTER = Path(__file__).parents[3] / "examples/adapters/kimi_audio.py"
NAMES = (
    "--decoder",
    "model.language_model.layers",
    "--final-norm",
    "model.language_model.norm",
    "--lm-head",
    "lm_head",
)
SETTINGS = ("--rank", "1", "--alpha", "0.5")


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Kimi-Audio's shape, which brings its own code."""
    return kimi_audio.save_checkpoint(tmp_path_factory.mktemp("kimi_audio"))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once that code ran."""
    monkeypatch.setenv(kimi_audio.RAN, str(tmp_path / "ran"))
    return tmp_path / "ran"


def calibrate(model: Path, harmful: Path, benign: Path, output: Path, *more: str):
    return sarsteer(
        "calibrate", model, "--harmful", harmful, "--benign", benign, "-o", output, *SETTINGS, "--json", *more
    )


def test_parts_that_are_named_give_the_plan_of_parts_that_are_found(
    checkpoint: Path, harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    for name, options in (("found", ()), ("named", NAMES)):
        answered_json(calibrate(checkpoint, harmful_requests, benign_requests, tmp_path / name, *options))
    found, named = (SteeringPlan.load(tmp_path / name) for name in ("found", "named"))
    for one, other in zip(found.edits, named.edits, strict=True):
        for name, tensor in one.tensors().items():
            np.testing.assert_array_equal(tensor, other.tensors()[name])
    assert "model_driven_by" not in found.provenance
    assert named.provenance["model_driven_by"] == {
        "parts": {
            "decoder": "model.language_model.layers",
            "final_norm": "model.language_model.norm",
            "lm_head": "lm_head",
        }
    }


@pytest.mark.parametrize("command", ["calibrate", "export", "build"])
def test_a_part_that_is_not_there_is_named_with_the_nearest_and_nothing_is_written(
    command: str, checkpoint: Path, harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    data = () if command == "export" else ("--harmful", harmful_requests, "--benign", benign_requests)
    result = sarsteer(command, checkpoint, *data, "-o", tmp_path / "out", "--decoder", "model.layers")
    refused(result, "decoder 'model.layers' is not in it", "model.language_model.layers")
    assert listing(tmp_path) == {}


def test_own_code_is_refused_and_not_run(
    kimi: Path, harmful_requests: Path, benign_requests: Path, marker: Path, tmp_path: Path
) -> None:
    arguments = (kimi, harmful_requests, benign_requests, tmp_path / "plan")
    words = ("modeling_moonshot_kimia.py", "which was not run", "--trust-remote-code")
    refused(calibrate(*arguments), *words)
    refused(calibrate(*arguments, "--adapter", f"{ADAPTER}:KimiAudio"), *words)
    refused(calibrate(*arguments, "--adapter", f"{ADAPTER}:KimiAudio", "--layers", "-1"), *words)
    refused(sarsteer("export", kimi, "-o", tmp_path / "onnx"), *words)
    assert not marker.exists()
    assert listing(tmp_path) == {}


def test_kimi_audio_is_calibrated_through_an_adapter(
    kimi: Path, harmful_requests: Path, benign_requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kimi_audio.install_prompt_package(monkeypatch)
    options = ("--adapter", f"{ADAPTER}:KimiAudio", "--trust-remote-code", "--layers", "-1")
    result = answered_json(calibrate(kimi, harmful_requests, benign_requests, tmp_path / "plan", *options))
    plan = SteeringPlan.load(tmp_path / "plan")
    assert (plan.num_layers, plan.hidden_size, {edit.layer for edit in plan.edits}) == (2, 32, {1})
    assert result["provenance"]["model"] == "MoonshotKimiaForCausalLM"
    driven = plan.provenance["model_driven_by"]
    assert driven["adapter_sha256"] == hashlib.sha256(ADAPTER.read_bytes()).hexdigest()
    assert set(driven) == {"adapter", "adapter_sha256", "remote_code_sha256"}


def test_an_adapter_that_is_not_there_is_one_error(
    checkpoint: Path, harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    arguments = (checkpoint, harmful_requests, benign_requests, tmp_path / "plan")
    refused(
        calibrate(*arguments, "--adapter", f"{ADAPTER}:Kimi"), "has no class Kimi; did you mean KimiAudio?"
    )
    refused(calibrate(*arguments, "--adapter", "mine.py:X"), "adapter mine.py: cannot be read")


def test_help_says_that_adapters_and_remote_code_are_run() -> None:
    for command in ("calibrate", "export", "build", "verify", "evaluate"):
        shown = " ".join(sarsteer(command, "--help").stdout.split())
        assert "--decoder MODULE" in shown
        assert "It is run as code." in shown
        assert "--trust-remote-code Run the Python code that comes with the checkpoint" in shown
