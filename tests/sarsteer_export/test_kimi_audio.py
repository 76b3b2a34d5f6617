"""Kimi-Audio's shape end to end: calibrated, exported and patched by the command line, then compared with eager."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.model_options import ModelOptions
from calibration.plan import SteeringPlan
from calibration.requests import read_requests
from engines.report import Verdict
from sarsteer_export.parity_run import AroundDecoder, ParityRun, ParitySettings
from tests.sarsteer_export.command_line import answered, sarsteer
from tests.zoo import kimi_audio

ADAPTER = Path(__file__).parents[2] / "examples/adapters/kimi_audio.py"


def test_it_is_exported_steered_and_agrees_with_eager(
    harmful_requests: Path, benign_requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kimi_audio.install_prompt_package(monkeypatch)
    model = kimi_audio.save_checkpoint(tmp_path / "model")
    driven = ("--adapter", f"{ADAPTER}:KimiAudio", "--trust-remote-code")
    data = ("--harmful", harmful_requests, "--benign", benign_requests)
    plan, onnx = tmp_path / "plan.safetensors", tmp_path / "onnx"
    answered(sarsteer("calibrate", model, *data, *driven, "-o", plan, "--rank", "1", "--alpha", "0.5"))
    answered(sarsteer("export", model, *driven, "-o", onnx))
    steered = onnx / "steered.onnx"
    answered(sarsteer("patch", onnx / "decoder_model_merged.onnx", "--plan", plan, "-o", steered))
    lalm = ModelOptions(adapter=driven[1], trust_remote_code=True).load(model)
    requests = read_requests(harmful_requests)[:3]
    run = ParityRun(lalm, SteeringPlan.load(plan), requests, ParitySettings(prompts=3, decode_steps=3))
    exported = run.check_export(onnx / "decoder_model_merged.onnx")
    report = run.check_steering(exported, steered, AroundDecoder((), ()))
    assert report.verdict is Verdict.PASSED, report.failures()
