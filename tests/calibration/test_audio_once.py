"""Every clip is heard once, and its silence not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.audio_once import (
    encoder_outputs_recorded,
    encoder_outputs_replayed,
    features_extracted_once,
)
from calibration.lalm import Lalm, encode_requests
from calibration.trimmed_encoder import trimmed
from tests import tiny_lalm
from tests.calibration.test_prompt_passes import ATOL, encoded


def test_encoder_outputs_are_given_out_again_and_no_more_often(lalm: Lalm, harmful_requests: Path) -> None:
    inputs, _ = encoded(lalm, harmful_requests, count=2)
    with torch.inference_mode():
        with encoder_outputs_recorded(lalm) as outputs:
            wanted = lalm.model(**inputs).logits
        silent = inputs | {"input_features": torch.zeros_like(inputs["input_features"])}
        with encoder_outputs_replayed(lalm, outputs):
            assert torch.equal(lalm.model(**silent).logits, wanted)
            with pytest.raises(RuntimeError, match="called more often"):
                lalm.model(**silent)
        assert not torch.equal(lalm.model(**silent).logits, wanted)


def test_features_of_the_same_samples_are_extracted_once(lalm: Lalm, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = lalm.processor.feature_extractor
    calls: list[int] = []
    extract = type(extractor).__call__
    monkeypatch.setattr(
        type(extractor),
        "__call__",
        lambda self, *args, **kwargs: calls.append(1) or extract(self, *args, **kwargs),
    )
    clips = [np.random.default_rng(row).standard_normal(8000).astype(np.float32) for row in range(2)]
    wanted = encode_requests(lalm, ["a", "b"], clips)
    with features_extracted_once(lalm):
        for _ in range(2):
            found = encode_requests(lalm, ["a", "b"], clips)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert len(calls) == 2
        encode_requests(lalm, ["a", "b"], clips[::-1])
        assert len(calls) == 3
    assert lalm.processor.feature_extractor is extractor


def test_silence_behind_short_clips_is_not_computed(lalm: Lalm, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int] = []
    stft = torch.stft

    def counted(samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        windows.append(samples.shape[-1])
        return stft(samples, *args, **kwargs)

    monkeypatch.setattr(torch, "stft", counted)
    clip = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    wanted = encode_requests(lalm, ["a"], [clip])
    with features_extracted_once(lalm):
        found = encode_requests(lalm, ["a"], [clip])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert windows[1] < windows[0] == lalm.processor.feature_extractor.n_samples


def test_an_encoder_without_its_silence_hears_the_same(lalm: Lalm, harmful_requests: Path) -> None:
    inputs, _ = encoded(lalm, harmful_requests)
    parts = lalm.adapter.audio_parts
    assert parts is not None
    frames: list[int] = []
    layer: Any = parts.encoder.layers[0]
    handle = layer.fc1.register_forward_pre_hook(lambda _, args: frames.append(args[0].shape[1]))
    with torch.inference_mode():
        wanted = lalm.model(**inputs).logits
        with trimmed(parts.encoder):
            got = lalm.model(**inputs).logits
    handle.remove()
    attended = inputs["attention_mask"].bool()
    np.testing.assert_allclose(got[attended], wanted[attended], rtol=0, atol=ATOL)
    longest = int(inputs["feature_attention_mask"].sum(dim=1).max())
    assert frames == [50 * tiny_lalm.CHUNK_SECONDS, (longest - 1) // 2 + 1]
    assert frames[1] < frames[0]
