"""Calibration from end to end on the tiny checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.calibrate import REFUSAL_PROMPT, CalibrationSettings, calibrate
from calibration.checkpoint import fingerprint
from calibration.directions import SteeringSettings
from calibration.errors import InputError
from calibration.lalm import Lalm, encode_requests
from calibration.magnitudes import recorded_magnitudes
from calibration.plan import SteeringPlan
from calibration.requests import SpokenRequest, load_audio, read_requests, requests_digest
from calibration.steered import steered
from tests import tiny_lalm

SETTINGS = CalibrationSettings(steering=SteeringSettings(rank=3))


@pytest.fixture(scope="module")
def plan(lalm: Lalm, harmful_requests: Path, benign_requests: Path) -> SteeringPlan:
    return calibrate(lalm, harmful_requests, benign_requests, SETTINGS)


def literal_state(lalm: Lalm, request: SpokenRequest, suffix: str) -> np.ndarray:
    """h_l(a, t) of every block, one request at a time, by the model's own hidden states."""
    clip = load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE)
    last_input: list[torch.Tensor] = []
    handle = lalm.parts.final_norm.register_forward_pre_hook(lambda _, args: last_input.append(args[0]))
    with torch.inference_mode():
        inputs = encode_requests(lalm, [request.text + suffix], [clip])
        hidden = lalm.model(**inputs, output_hidden_states=True).hidden_states
    handle.remove()
    return np.stack([h[0, -1].double().numpy() for h in (*hidden[1:-1], last_input[0])])


def test_vectors_are_the_methods_from_audio_to_vector(
    lalm: Lalm, plan: SteeringPlan, harmful_requests: Path, benign_requests: Path
) -> None:
    harmful, benign = read_requests(harmful_requests), read_requests(benign_requests)
    plain = np.stack([literal_state(lalm, request, "") for request in harmful])
    refused = np.stack([literal_state(lalm, request, REFUSAL_PROMPT) for request in harmful])
    safe = np.stack([literal_state(lalm, request, "") for request in benign])
    assert len(plan.edits) == tiny_lalm.LAYERS
    for layer, edit in enumerate(plan.edits):
        v = (refused - plain)[:, layer].mean(axis=0)
        U = np.linalg.svd((safe[:, layer] - safe[:, layer].mean(axis=0)).T)[0][:, :3]
        expected = v - U @ (U.T @ v)
        got = edit.tensors()["vector"].astype(np.float64)
        assert got @ expected / np.linalg.norm(got) / np.linalg.norm(expected) >= 0.99999
        assert abs(np.linalg.norm(got) / np.linalg.norm(expected) - 1) <= 1e-3
        assert np.linalg.norm(v) > 1.01 * np.linalg.norm(expected)


def test_provenance_says_what_the_plan_was_computed_from(
    lalm: Lalm, plan: SteeringPlan, checkpoint: Path, harmful_requests: Path, benign_requests: Path
) -> None:
    provenance = dict(plan.provenance)
    versions, largest = provenance.pop("versions"), provenance.pop("largest_magnitude")
    assert versions.keys() == {"sarsteer-export", "torch", "transformers", "numpy"}
    assert versions["numpy"] == np.__version__
    clips = [
        request.clip() for path in (harmful_requests, benign_requests) for request in read_requests(path)
    ]
    template = str(lalm.processor.chat_template).encode()
    assert provenance == {
        "method": "SARSteer (arXiv 2510.17633)",
        "model": "Qwen2AudioForConditionalGeneration",
        "model_id": checkpoint.name,
        "model_dtype": "float32",
        "model_fingerprint": fingerprint(checkpoint),
        "chat_template_sha256": hashlib.sha256(template).hexdigest(),
        "refusal_prompt": "I cannot assist with that.",
        "prompts": ["please respond to the audio."],
        "harmful": {"count": 6, "skipped": 0, "sha256": requests_digest(read_requests(harmful_requests))},
        "benign": {"count": 5, "skipped": 0, "sha256": requests_digest(read_requests(benign_requests))},
        "seen": {
            "clips": sorted(hashlib.sha256(clip.read_bytes()).hexdigest()[:16] for clip in clips),
            "transcripts": [],
        },
        "alpha": 0.1,
        "lambda": 1.0,
        "rank": 3,
        "rank_requested": 3,
        "seed": 0,
    }
    assert str(checkpoint) not in json.dumps(provenance)
    assert largest.keys() == {"unsteered", "steered"}


def test_provenance_says_how_large_the_stream_gets_with_and_without_the_plan(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path
) -> None:
    settings = CalibrationSettings(steering=SteeringSettings(rank=3, alpha=50.0), batch_size=4)
    seen: list[tuple[str, int, int]] = []
    plan = calibrate(
        lalm, harmful_requests, benign_requests, settings, progress=lambda *step: seen.append(step)
    )
    largest = plan.provenance["largest_magnitude"]
    requests = [*read_requests(harmful_requests), *read_requests(benign_requests)]
    suffixed = [(request, REFUSAL_PROMPT) for request in read_requests(harmful_requests)]
    plain = [(request, "") for request in requests]
    with recorded_magnitudes(lalm.parts) as record:
        for request, suffix in (*plain, *suffixed):
            literal_state(lalm, request, suffix)
    np.testing.assert_allclose(largest["unsteered"], record.largest_L(), rtol=1e-5, atol=0)
    with steered(lalm.model, plan), recorded_magnitudes(lalm.parts) as record:
        for request, suffix in plain:
            literal_state(lalm, request, suffix)
    np.testing.assert_allclose(largest["steered"], record.largest_L(), rtol=1e-5, atol=0)
    assert max(np.divide(largest["steered"], largest["unsteered"])) > 2
    expected = [("harmful", 2, 6), ("harmful", 6, 6), ("benign", 4, 5), ("benign", 5, 5)]
    assert seen == [*expected, *(("steered", done, 11) for done in (2, 6, 10, 11))]


def test_a_stream_that_overflows_is_refused_before_anything_is_computed_from_it(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path
) -> None:
    model = copy.deepcopy(lalm.model).half()
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1000)
        model.get_decoder().layers[1].mlp.down_proj.weight.mul_(2e5)
    overflowing = dataclasses.replace(lalm, model=model)
    with pytest.raises(InputError, match=r"unsteered residual stream .* in block 1; it overflows float16"):
        calibrate(overflowing, harmful_requests, benign_requests, SETTINGS)


def test_the_digest_does_not_depend_on_what_was_measured(plan: SteeringPlan) -> None:
    bare = {name: value for name, value in plan.provenance.items() if name != "largest_magnitude"}
    assert dataclasses.replace(plan, provenance=bare).digest() == plan.digest()


def test_a_calibrated_plan_survives_its_file(plan: SteeringPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.safetensors")
    assert SteeringPlan.load(tmp_path / "plan.safetensors") == plan


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_does_not_matter(
    lalm: Lalm, plan: SteeringPlan, harmful_requests: Path, benign_requests: Path, batch_size: int
) -> None:
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
    other = calibrate(lalm, harmful_requests, benign_requests, settings)
    measured, expected_measured = (dict(found.provenance["largest_magnitude"]) for found in (other, plan))
    assert other.provenance == {**plan.provenance, "largest_magnitude": measured}
    for kind in ("unsteered", "steered"):  # six digits are kept; the last may differ
        np.testing.assert_allclose(measured[kind], expected_measured[kind], rtol=1e-5, atol=0)
    for got, expected in zip(other.edits, plan.edits, strict=True):
        # measured 1.2e-7: states differ by 3e-7, see test_states
        np.testing.assert_allclose(got.tensors()["vector"], expected.tensors()["vector"], rtol=0, atol=1e-6)


def test_calibration_is_deterministic_and_loads_a_directory(
    plan: SteeringPlan, checkpoint: Path, harmful_requests: Path, benign_requests: Path
) -> None:
    assert calibrate(checkpoint, harmful_requests, benign_requests, SETTINGS).to_bytes() == plan.to_bytes()


def test_limit_and_seed_pick_the_requests(lalm: Lalm, harmful_requests: Path, benign_requests: Path) -> None:
    def digests(seed: int) -> tuple[str, str]:
        settings = CalibrationSettings(steering=SteeringSettings(rank=1), limit=3, seed=seed)
        provenance = calibrate(lalm, harmful_requests, benign_requests, settings).provenance
        assert (provenance["harmful"]["count"], provenance["benign"]["count"]) == (3, 3)
        assert provenance["seed"] == seed
        return provenance["harmful"]["sha256"], provenance["benign"]["sha256"]

    assert digests(1) == digests(1)
    for one, other in zip(digests(1), digests(2), strict=True):
        assert one != other


def test_a_clamped_rank_is_said_and_recorded(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="calibration"):
        provenance = calibrate(lalm, harmful_requests, benign_requests).provenance
    assert (provenance["rank"], provenance["rank_requested"]) == (4, 10)
    assert "rank 10 is more than 5 benign clips can span; using rank 4" in caplog.text


def test_fewer_than_two_benign_clips_are_refused(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    first = read_requests(benign_requests)[0]
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"audio": str(first.audio), "text": first.text}))
    with pytest.raises(InputError, match=re.escape(str(path)) + ": 1 benign request; expected at least 2"):
        calibrate(lalm, harmful_requests, path)


def test_a_missing_clip_is_refused_with_its_name(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"audio": "none.wav", "text": "x"}))
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "none.wav"))):
        calibrate(lalm, path, benign_requests)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"limit": 0}, "limit is 0"), ({"batch_size": 0}, "batch size is 0")]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationSettings(**wrong)  # type: ignore[arg-type]


def test_an_empty_refusal_prompt_is_refused(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path
) -> None:
    with pytest.raises(InputError, match="refusal prompt is empty"):
        calibrate(lalm, harmful_requests, benign_requests, CalibrationSettings(refusal_prompt=""))
