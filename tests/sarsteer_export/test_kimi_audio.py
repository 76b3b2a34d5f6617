"""Kimi-Audio's shape from end to end: calibrated, exported, steered, compared with eager, and verified again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sarsteer_export.command_line import answered, refused, sarsteer
from tests.zoo import kimi_audio

ADAPTER = Path(__file__).parents[2] / "examples/adapters/kimi_audio.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kimi_audio.save_checkpoint(tmp_path_factory.mktemp("kimi_audio"))


@pytest.fixture(scope="module")
def bundle(
    model: Path, harmful_requests: Path, benign_requests: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of it: parity of prefill and cached decode passed, with negative controls, or there were none."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    data = (
        "--harmful",
        harmful_requests,
        "--benign",
        benign_requests,
        "--prompts",
        "3",
        "--decode-steps",
        "3",
    )
    with pytest.MonkeyPatch.context() as patch:
        kimi_audio.install_prompt_package(patch)
        answered(
            sarsteer("build", model, *data, *driven(ADAPTER), "-o", folder, "--rank", "1", "--alpha", "0.5")
        )
    return folder


def driven(adapter: Path) -> tuple[str, ...]:
    return ("--adapter", f"{adapter}:KimiAudio", "--trust-remote-code")


def test_its_bundle_says_what_drives_it_and_what_is_not_in_it(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["verdict"] == "passed"
    assert manifest["model"]["driven_by"]["adapter"] == "KimiAudio"
    assert set(manifest["model"]["missing"]) == {"audio_encoder", "frontend"}
    told = answered(sarsteer("inspect", bundle))
    assert "without frontend: its processor is driven by the adapter KimiAudio" in told


def test_its_bundle_is_not_evaluated(bundle: Path, harmful_requests: Path, benign_requests: Path) -> None:
    data = ("--harmful", harmful_requests, "--benign", benign_requests)
    refused(sarsteer("evaluate", bundle, *data), "evaluate its checkpoint with --plan", code=3)


def test_it_is_verified_with_the_adapter_it_was_made_with_and_no_other(
    bundle: Path, model: Path, harmful_requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kimi_audio.install_prompt_package(monkeypatch)
    asked = (
        "verify",
        bundle,
        "--model",
        model,
        "--requests",
        harmful_requests,
        "--prompts",
        "2",
        "--decode-steps",
        "2",
    )
    assert "verdict: passed" in answered(sarsteer(*asked, *driven(ADAPTER)))
    other = tmp_path / "kimi_audio.py"
    other.write_text(ADAPTER.read_text(encoding="utf-8") + "# changed since\n", encoding="utf-8")
    refused(sarsteer(*asked, *driven(other)), "driven by adapter KimiAudio", "give the same --adapter")
