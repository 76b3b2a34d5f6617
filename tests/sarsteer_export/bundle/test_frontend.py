"""The bundle's front end computes, without torch, what transformers' processor computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests
from calibration.requests import load_audio, read_requests
from sarsteer_export import Bundle
from sarsteer_export.around_decoder import FEATURES_LIMIT
from sarsteer_export.bundle.frontend import Frontend, check_extractor
from sarsteer_export.bundle.manifest import CHAT_TEMPLATE, PROCESSOR
from tests.sarsteer_export.conftest import Inputs

TEXTS = ("please respond to the audio.", "Ünïcode ☃ text\nwith a second line", "a  b", "<p>{{ braces }}</p>")


@pytest.fixture(scope="module")
def clips(inputs: Inputs, lalm: Lalm) -> list[np.ndarray]:
    found = [
        load_audio(request.audio, sampling_rate=lalm.sampling_rate)
        for request in read_requests(inputs.harmful)
    ][: len(TEXTS)]
    assert len({clip.size for clip in found}) == len(TEXTS)
    return found


@pytest.mark.parametrize("spoken", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_is_the_processor_s(bundle: Bundle, lalm: Lalm, text: str, spoken: bool) -> None:
    content = ([{"type": "audio", "audio": ""}] if spoken else []) + [{"type": "text", "text": text}]
    wanted = lalm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert bundle.frontend.prompt(text, spoken=spoken) == wanted
    assert text in wanted


def test_tokens_with_every_audio_token_expanded_are_the_processor_s(
    bundle: Bundle, lalm: Lalm, clips: list[np.ndarray]
) -> None:
    inputs = encode_requests(lalm, list(TEXTS), clips)
    audio = bundle.manifest.tokens["audio"]
    lengths = [len(rows) for rows in bundle._encode_audio([("clip", clip) for clip in clips])]
    assert len(set(lengths)) > 1
    for row, (text, length) in enumerate(zip(TEXTS, lengths, strict=True)):
        prompt = bundle.frontend.prompt(text, spoken=True)
        ids = bundle.frontend.tokenizer.encode(prompt, add_special_tokens=False).ids
        assert ids.count(audio) == 1
        at = ids.index(audio)
        expanded = [*ids[:at], *[audio] * length, *ids[at + 1 :]]
        attended = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][attended].tolist() == expanded


def test_features_and_masks_are_the_processor_s(bundle: Bundle, lalm: Lalm, clips: list[np.ndarray]) -> None:
    features, mask = bundle.frontend.features(clips)
    wanted = encode_requests(lalm, list(TEXTS), clips)
    assert features.dtype == np.float32
    assert features.shape == tuple(wanted["input_features"].shape)
    difference = np.abs(features - wanted["input_features"].numpy()).max()
    assert 0 < difference < FEATURES_LIMIT
    np.testing.assert_array_equal(mask, wanted["feature_attention_mask"].numpy())
    assert len({int(row.sum()) for row in mask}) == len(clips)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 31_999, 32_000])
def test_masks_at_the_edges_of_a_frame_are_the_processor_s(bundle: Bundle, lalm: Lalm, samples: int) -> None:
    clip = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) * 0.1
    extract = lalm.processor.feature_extractor
    wanted = extract(
        [clip], sampling_rate=16_000, return_attention_mask=True, padding="max_length", return_tensors="np"
    )
    features, mask = bundle.frontend.features([clip])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])
    assert np.abs(features - wanted["input_features"]).max() < FEATURES_LIMIT


def test_a_clip_over_the_limit_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"32001 samples; the model hears at most 32000 \(2 s\)"):
        bundle.frontend.features([np.zeros(32_001, np.float32)])


def test_embeddings_and_masks_are_left_padded(bundle: Bundle, clips: list[np.ndarray]) -> None:
    prompts = bundle.prompts(clips, TEXTS)
    lengths = prompts.mask.sum(axis=1)
    assert len(set(lengths)) > 1
    for row, length in zip(prompts.mask, lengths, strict=True):
        assert row[-length:].all()
        assert not row[: len(row) - length].any()
    assert not prompts.embeds[prompts.mask == 0].any()
    assert np.abs(prompts.embeds[prompts.mask != 0]).max(axis=-1).min() > 0


def test_a_template_that_refuses_is_an_error_of_the_input(bundle_path: Path, tmp_path: Path) -> None:
    for file in (CHAT_TEMPLATE, PROCESSOR):
        shutil.copy(bundle_path / file, tmp_path)
    (tmp_path / CHAT_TEMPLATE).write_text("{{ raise_exception('no user turn') }}", encoding="utf-8")
    with pytest.raises(InputError, match="no user turn"):
        Frontend(tmp_path).prompt("hello", spoken=False)


def test_a_template_cannot_reach_into_the_process(tmp_path: Path) -> None:
    (tmp_path / CHAT_TEMPLATE).write_text("{{ messages.__class__.__mro__ }}", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be rendered"):
        Frontend(tmp_path).prompt("hello", spoken=False)


@pytest.mark.parametrize("change", [{"feature_extractor_type": "MelExtractor"}, {"dither": 0.1}])
def test_features_it_cannot_compute_are_refused(
    bundle_path: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    content = json.loads((bundle_path / PROCESSOR).read_text(encoding="utf-8"))
    check_extractor(content["feature_extractor"])
    content["feature_extractor"] |= change
    (tmp_path / PROCESSOR).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="WhisperFeatureExtractor without dither"):
        _ = Frontend(tmp_path).sampling_rate
