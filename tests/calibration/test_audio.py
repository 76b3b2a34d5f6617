"""Clips: any format libsndfile reads, any rate, any channel count, from files or from inside a data set."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from calibration.audio import EmbeddedAudio, audio_sha256, header_seconds, load_audio
from calibration.errors import InputError

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_a_clip_at_the_model_rate_comes_back_sample_for_sample(tmp_path: Path) -> None:
    clip = tone().astype(np.float32)
    soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav", sampling_rate=RATE)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, clip)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_rate_is_resampled(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate=rate), rate, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav", sampling_rate=RATE)
    assert loaded.dtype == np.float32
    assert loaded.shape == (RATE // 2,)
    middle = slice(RATE // 8, 3 * RATE // 8)
    # soxr's HQ filter is flat in its pass band: measured 4e-7
    np.testing.assert_allclose(loaded[middle], tone()[middle], rtol=0, atol=5e-6)


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = tone().astype(np.float32), tone(hertz=700).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(
        load_audio(tmp_path / "a.wav", sampling_rate=RATE), (left + right) / np.float32(2)
    )


def test_flac_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(), RATE)
    loaded = load_audio(tmp_path / "a.flac", sampling_rate=RATE)
    np.testing.assert_allclose(loaded, tone(), rtol=0, atol=2**-15)  # 16-bit quantisation


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(0), "holds no samples"),
        (np.zeros(RATE), "is silent"),
        (np.full(RATE, 5e-5), "is silent"),
        (np.r_[tone(), np.nan], "NaN or infinite"),
        (np.r_[tone(), np.inf], "NaN or infinite"),
        (tone(seconds=2.5), "lasts 2.50 s; the model hears at most 2 s"),
    ],
    ids=["empty", "zeros", "faint", "NaN", "infinite", "too long"],
)
def test_a_bad_clip_is_refused_with_its_name(tmp_path: Path, clip: np.ndarray, message: str) -> None:
    soundfile.write(tmp_path / "bad.wav", clip, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match=re.escape(f"audio {tmp_path / 'bad.wav'}: ") + ".*" + message):
        load_audio(tmp_path / "bad.wav", sampling_rate=RATE, max_seconds=2)


def test_a_clip_as_long_as_the_model_hears_is_accepted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(seconds=2), RATE)
    assert load_audio(tmp_path / "a.wav", sampling_rate=RATE, max_seconds=2).shape == (2 * RATE,)


def test_a_clip_that_resampling_leaves_nothing_of_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.5]), 192_000, subtype="FLOAT")
    with pytest.raises(InputError, match="holds no samples at 16000 Hz"):
        load_audio(tmp_path / "a.wav", sampling_rate=RATE)


def test_a_missing_file_or_one_that_is_not_audio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_audio(tmp_path / "none.wav", sampling_rate=RATE)
    with pytest.raises(InputError, match="no such file"):
        load_audio(tmp_path, sampling_rate=RATE)
    for content in (b"", b"not audio at all", b"RIFF\x00\x00\x00\x00WAVE"):
        (tmp_path / "bad.wav").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.wav: not a readable audio file"):
            load_audio(tmp_path / "bad.wav", sampling_rate=RATE)


# ---------------------------------------------------------------------------------------------------- formats

FORMATS = {
    "16-bit wav": ("WAV", "PCM_16"),
    "24-bit wav": ("WAV", "PCM_24"),
    "8-bit wav": ("WAV", "PCM_U8"),
    "extensible wav": ("WAVEX", "PCM_24"),
    "flac": ("FLAC", "PCM_24"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg vorbis": ("OGG", "VORBIS"),
    "ogg opus": ("OGG", "OPUS"),
    "aiff": ("AIFF", "PCM_16"),
}
QUANTISATION = {"PCM_16": 2**-15, "PCM_24": 2**-23, "PCM_U8": 2**-7}
"""One step of a sample format. Lossy formats are held against their own decoded samples instead."""


def chord(channels: int, rate: int, seconds: float = 0.5) -> np.ndarray:
    """Another tone in each channel, (samples, channels), all far below the filter's edge at 8 and at 16 kHz."""
    return np.stack([tone(seconds, rate, 300 + 60 * channel) for channel in range(channels)], axis=1)


@pytest.mark.parametrize("rate", [8_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_decoded_averaged_and_resampled(
    tmp_path: Path, name: str, channels: int, rate: int
) -> None:
    container, subtype = FORMATS[name]
    path = tmp_path / "clip"  # formats are told by content, not by name
    soundfile.write(path, chord(channels, rate), rate, format=container, subtype=subtype)
    loaded = load_audio(path, sampling_rate=RATE)
    decoded, decoded_rate = soundfile.read(path, dtype="float64", always_2d=True)
    assert (decoded_rate, decoded.shape[1]) == (rate, channels)
    expected = soxr.resample(decoded.mean(axis=1), rate, RATE)  # the same filter, in float64
    assert loaded.dtype == np.float32
    # samples of about 1, filtered in float32: measured 2e-7
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=2e-6)
    if subtype in QUANTISATION:
        middle = slice(RATE // 8, 3 * RATE // 8)
        ideal = chord(channels, RATE).mean(axis=1)[: len(loaded)]
        # the filter is flat where the tones are: 4e-7
        np.testing.assert_allclose(
            loaded[middle], ideal[middle], rtol=0, atol=2 * QUANTISATION[subtype] + 5e-6
        )


@pytest.mark.parametrize(("channels", "rate"), [(8, 48_000), (6, 44_100), (8, 96_000), (1, 192_000)])
def test_many_channels_and_high_rates_of_24_bits(tmp_path: Path, channels: int, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", chord(channels, rate), rate, subtype="PCM_24")
    loaded = load_audio(tmp_path / "a.wav", sampling_rate=RATE)
    middle = slice(RATE // 8, 3 * RATE // 8)
    # 24 bits are 1e-7; soxr's HQ filter is flat in its pass band: measured 4e-7
    np.testing.assert_allclose(loaded[middle], chord(channels, RATE).mean(axis=1)[middle], rtol=0, atol=5e-6)


def test_what_the_model_cannot_hear_is_filtered_not_folded_down(tmp_path: Path) -> None:
    both = tone(rate=48_000) + tone(rate=48_000, hertz=15_000)  # 15 kHz folds to 1 kHz at 16 kHz
    soundfile.write(tmp_path / "a.wav", 0.9 * both, 48_000, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav", sampling_rate=RATE)
    middle = slice(RATE // 8, 3 * RATE // 8)
    # soxr's HQ stop band is 120 dB down; measured 2e-6
    np.testing.assert_allclose(loaded[middle], 0.9 * tone()[middle], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------- embedded


def test_embedded_audio_is_read_when_it_is_needed_and_says_what_a_file_says(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", chord(2, 48_000), 48_000)
    content = (tmp_path / "a.flac").read_bytes()
    reads: list[int] = []

    def read() -> bytes:
        reads.append(1)
        return content

    clip = EmbeddedAudio("data, row 3", read)
    assert (str(clip), clip.name, repr(clip)) == (
        "data, row 3",
        "data, row 3",
        "EmbeddedAudio(name='data, row 3')",
    )
    assert not reads
    np.testing.assert_array_equal(
        load_audio(clip, sampling_rate=RATE), load_audio(tmp_path / "a.flac", sampling_rate=RATE)
    )
    assert audio_sha256(clip) == audio_sha256(tmp_path / "a.flac")
    header_seconds(clip)
    assert len(reads) == 3


def test_embedded_audio_that_is_none_is_refused_with_its_name() -> None:
    clip = EmbeddedAudio("data, row 3", lambda: b"nonsense")
    for refused in (header_seconds, lambda source: load_audio(source, sampling_rate=RATE)):
        with pytest.raises(
            InputError, match=r"audio data, row 3: not a readable audio file; expected wav, flac"
        ):
            refused(clip)


def test_a_file_that_is_called_raw_is_refused_like_any_other_nonsense(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\0" * 100)  # soundfile raises a TypeError for this name
    with pytest.raises(InputError, match=r"a\.raw: not a readable audio file"):
        load_audio(tmp_path / "a.raw", sampling_rate=RATE)
    with pytest.raises(InputError, match=r"a\.raw: not a readable audio file"):
        header_seconds(tmp_path / "a.raw")
