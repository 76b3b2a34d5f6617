"""The check for machines with a GPU: it refuses without one, and all it measures works, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import gpu_check
from calibration.errors import EngineError, UnsupportedError
from calibration.plan import SteeringPlan
from engines.backends import BACKENDS, CPU_BACKEND
from engines.cuda_driver import cuda_driver
from gpu_measure import AGAIN, STEERED, UNSTEERED, check_steered, of_bundle, other_plan, paired, script_of
from sarsteer_export import load_bundle
from sarsteer_export.bundle.manifest import STEERED_DECODER
from sarsteer_export.parity_runtime import OnnxRuntimeParity
from tests.sarsteer_export.conftest import Inputs


@pytest.mark.skipif(cuda_driver().problem is None, reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [[], ["--engine", "tensorrt-rtx"]])
def test_without_a_gpu_it_says_so_and_writes_nothing(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "check.md"
    result = CliRunner().invoke(gpu_check.main, [*arguments, "-o", str(output)])
    assert result.exit_code == 3
    assert "tensorrt-rtx runs on an NVIDIA GPU" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_everything_it_measures_works(bundle_path: Path, inputs: Inputs) -> None:
    found = of_bundle(bundle_path, inputs.model, inputs.harmful, CPU_BACKEND, rounds=2, tokens=3, prompts=2)
    assert found["refit"]["passed"], found["refit"]
    assert found["refit"]["difference"] == 0
    assert (found["answers"]["same"], found["answers"]["of"]) == (2, 2)
    assert found["answers"]["engine"] == found["answers"]["eager"] != ""
    for phase in ("prefill", "decode"):
        assert found["latency"][phase]["ratio"]["median"] > 0
    assert [entry["batch"] for entry in found["throughput"]] == [1, 2]
    assert all(entry["same_tokens"] == 1 for entry in found["throughput"])
    results = [
        {
            "engine": "onnxruntime-cpu",
            "version": "1",
            "precision": "float32",
            "verdict": "passed",
            "table": "T",
        }
        | found,
        {
            "engine": "onnxruntime-cpu",
            "precision": "float16",
            "verdict": "failed",
            "error": "ParityError: no",
        },
    ]
    tests = {"exit_code": 0, "summary": "1 passed"}
    text = gpu_check.page({"command": "python x", "doctor": "D", "tests": tests, "results": results})
    assert text.startswith("**A dry run on the CPU: it says nothing about a GPU.**")
    assert "### onnxruntime-cpu 1, float32: passed" in text
    assert "**Failed:** onnxruntime-cpu, float16: failed\n" in text
    assert "Refit: passed" in text
    assert "Answers: 2 of 2 word for word" in text
    assert "ParityError: no" in text
    json.dumps(found, allow_nan=False)


PASSED = {"verdict": "passed", "refit": {"passed": True}, "answers": {}, "latency": {}, "throughput": []}


@pytest.mark.parametrize(
    ("result", "tests", "expected"),
    [
        (PASSED, 0, 0),
        (PASSED, 1, 6),
        (PASSED | {"refit": {"passed": False}}, 0, 6),
        (PASSED | {"refit": {"error": "no"}}, 0, 6),
        (PASSED | {"latency": {"error": "no"}}, 0, 6),
        (PASSED | {"answers": {"error": "no"}}, 0, 6),
        (PASSED | {"throughput": {"error": "no"}}, 0, 6),
        ({"verdict": "failed", "error": "no"}, 0, 6),
        ({"verdict": "built, not executed"}, 0, 6),
        ({"verdict": "cannot be run here", "error": "no"}, 0, 3),
    ],
)
def test_only_what_passed_in_everything_ends_with_0(
    result: dict[str, Any], tests: int, expected: int
) -> None:
    here = {"engine": "tensorrt", "precision": "float32"}
    found = {"results": [here | result], "tests": {"exit_code": tests, "summary": "13 passed in 9 s"}}
    assert gpu_check.exit_code(found) == expected
    found["results"].append(here | PASSED)
    assert gpu_check.exit_code(found) == (6 if expected == 6 else 0)


def test_tests_that_were_all_skipped_prove_nothing() -> None:
    skipped = {"exit_code": 0, "summary": "13 skipped in 3 s"}
    on_gpu = [{"engine": "tensorrt", "precision": "float32"} | PASSED]
    on_cpu = [{"engine": "onnxruntime-cpu", "precision": "float32"} | PASSED]
    assert gpu_check.exit_code({"results": on_gpu, "tests": skipped}) == 6
    assert gpu_check.exit_code({"results": on_cpu, "tests": skipped}) == 0
    assert gpu_check.exit_code({"results": [], "tests": skipped}) == 3


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(UnsupportedError("libcudnn is missing"), "cannot be run here"), (RuntimeError("no"), "failed")],
)
def test_an_engine_that_fails_does_not_stop_the_others(
    error: Exception, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gpu_check, "build", fail)
    found = gpu_check.check(BACKENDS["onnxruntime-cuda"], "float32", tmp_path, rounds=2, tokens=2)
    assert found["verdict"] == verdict
    assert str(error) in found["error"]


def test_ratios_are_taken_within_a_round() -> None:
    found = paired({UNSTEERED: [1.0, 4.0], STEERED: [2.0, 4.0], AGAIN: [1.0, 2.0]})
    assert found.ratio.median == pytest.approx(1.5)
    assert found.noise_ratio.median == pytest.approx(0.75)


def test_a_refit_is_measured_with_other_values_in_every_constant(plan: SteeringPlan) -> None:
    other = other_plan(plan)
    for old, new in zip(plan.edits, other.edits, strict=True):
        for name, tensor in old.tensors().items():
            assert not np.array_equal(tensor, new.tensors()[name])


def test_steering_that_does_nothing_is_not_measured(bundle_path: Path) -> None:
    runtime = OnnxRuntimeParity(CPU_BACKEND)
    with load_bundle(bundle_path) as bundle:
        script = script_of(bundle.prompts([None], ["hello"]))
    steered = bundle_path / STEERED_DECODER
    with (
        runtime.file(steered) as one,
        runtime.file(steered) as two,
        pytest.raises(EngineError, match="computes what the unsteered one does"),
    ):
        check_steered({UNSTEERED: one, STEERED: two}, script)
