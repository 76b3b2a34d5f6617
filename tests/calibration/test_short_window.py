"""Whisper's features from a window as long as the clips are those from the whole window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from calibration.short_window import extract

RATE = 16_000
ATOL = 1e-6
"""Measured 0: the same float32 sums per frame; a matrix product of another width may order them otherwise."""


def clips(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [(0.1 * generator.standard_normal(length)).astype(np.float32) for length in lengths]


def whisper(**settings: Any) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(**{"feature_size": 16, "chunk_length": 3} | settings)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of every window of which a spectrogram is computed."""
    windows: list[int] = []
    stft = torch.stft
    monkeypatch.setattr(
        torch,
        "stft",
        lambda samples, *args, **kwargs: windows.append(samples.shape[-1]) or stft(samples, *args, **kwargs),
    )
    return windows


def assert_same(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert type(got[name]) is type(wanted[name])
        assert got[name].shape == wanted[name].shape
        assert got[name].dtype == wanted[name].dtype
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(wanted[name]), rtol=0, atol=ATOL)


@pytest.mark.parametrize("tensors", ["pt", "np"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    ("settings", "asked", "whole"),
    [
        ({}, {}, 3 * RATE),
        ({}, {"padding": "max_length", "max_length": 2 * RATE}, 2 * RATE),
        ({}, {"padding": True, "pad_to_multiple_of": 2 * RATE}, 2 * RATE),
        ({"chunk_length": 2, "hop_length": 150}, {}, 2 * RATE),
        ({"chunk_length": 2, "hop_length": 150, "n_fft": 512}, {}, 2 * RATE),
    ],
)
def test_features_and_mask_are_those_of_the_whole_window(
    settings: dict[str, Any], asked: dict[str, Any], whole: int, tensors: str, mask: bool, heard: list[int]
) -> None:
    extractor = whisper(**settings)
    asked = asked | {"sampling_rate": RATE, "return_tensors": tensors, "return_attention_mask": mask}
    some = clips(9_000, 16_001, 300)
    got, wanted = extract(extractor, some, **asked), extractor(some, **asked)
    assert_same(got, wanted)
    short, long = heard
    assert long == whole
    assert 16_001 + 2 * extractor.n_fft <= short < 16_001 + 3 * extractor.n_fft


def test_one_clip_alone(heard: list[int]) -> None:
    (clip,) = clips(5_000)
    asked = {"sampling_rate": RATE, "return_tensors": "pt"}
    assert_same(extract(whisper(), clip, **asked), whisper()(clip, **asked))
    assert heard[0] < heard[1]


@pytest.mark.parametrize("length", [3 * RATE - 700, 3 * RATE, 4 * RATE])
def test_clips_that_fill_the_window_are_left_to_the_extractor(length: int, heard: list[int]) -> None:
    asked = {"sampling_rate": RATE, "return_tensors": "pt", "return_attention_mask": True}
    some = clips(length, 5_000)
    assert_same(extract(whisper(), some, **asked), whisper()(some, **asked))
    assert heard == [3 * RATE, 3 * RATE]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"dither": 0.1}, {}),
        ({"padding_value": 0.5}, {}),
        ({}, {"do_normalize": True}),
        ({}, {"padding": True}),
        ({}, {"padding": "longest"}),
    ],
    ids=str,
)
def test_windows_of_which_every_sample_counts_are_not_shortened(
    settings: dict[str, Any], asked: dict[str, Any], heard: list[int]
) -> None:
    asked = asked | {"sampling_rate": RATE, "return_tensors": "pt"}
    extract(whisper(**settings), clips(9_000), **asked)
    whisper(**settings)(clips(9_000), **asked)
    assert heard[0] == heard[1]


def test_other_extractors_and_other_clips_are_called_as_they_are(heard: list[int]) -> None:
    other = ClapFeatureExtractor()
    asked = {"sampling_rate": other.sampling_rate, "return_tensors": "np", "truncation": "rand_trunc"}
    assert_same(extract(other, clips(9_000), **asked), other(clips(9_000), **asked))
    extract(whisper(), [[0.1] * 900], sampling_rate=RATE, return_tensors="pt")
    assert heard == [3 * RATE]
