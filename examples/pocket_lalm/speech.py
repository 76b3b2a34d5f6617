"""Speech from espeak-ng: which voices there are, and text to 16 kHz samples.

Dimension legend: T samples of one clip at 16 kHz.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np
import soundfile
import soxr

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
PEAK = 0.25
"""Clips peak at -12 dB of full scale: quieter samples need fewer bits, a quarter less FLAC to ship."""

_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbcwmd")
_TIMBRES = (
    *(
        "f1",
        "f2",
        "f3",
        "f4",
        "m1",
        "m3",
        "m4",
        "m6",
        "m7",
        "m8",
        "Andy",
        "Annie",
        "Alex",
        "Gene",
        "Jacky",
        "Lee",
    ),
    *("Mario", "Michael", "Mike", "belinda", "benjamin", "david", "edward", "linda", "max", "steph"),
)
TRAINING_VOICES = _ACCENTS + tuple(
    f"{_ACCENTS[index % len(_ACCENTS)]}+{timbre}" for index, timbre in enumerate(_TIMBRES)
)
HELD_OUT_VOICES = (
    *("en-us+f5", "en-us+m2", "en-gb+m5"),
    *("en-gb-x-gbclan", "en-029+victor", "en-gb-scotland+adam"),
)
"""Timbres that no training voice has, and one accent (Lancaster) that none has."""


@dataclass(frozen=True)
class Utterance:
    """What espeak-ng is asked to say: speed in words a minute, pitch on its 0-99 scale (50 is neutral)."""

    text: str
    voice: str
    speed_wpm: int
    pitch: int


def require_espeak() -> None:
    """Raise `click.ClickException` when espeak-ng is not on the path."""
    if shutil.which("espeak-ng") is None:
        raise click.ClickException(
            "espeak-ng was not found on the PATH: it speaks every clip the pocket LALM is trained on. "
            "Install it, e.g. with `apt-get install espeak-ng` or `brew install espeak-ng`."
        )


def synthesise(utterance: Utterance) -> NDArray[np.int16]:
    """Speak one utterance: (T,) 16-bit samples at 16 kHz, 50 ms of silence at most on either side.

    The samples are 16-bit on purpose: a clip written as FLAC reads back as exactly what training saw.

    Raises:
        click.ClickException: espeak-ng failed, for example because the voice is not installed.
    """
    command = ["espeak-ng", "-v", utterance.voice, "-s", str(utterance.speed_wpm), "-p", str(utterance.pitch)]
    spoken = subprocess.run([*command, "--stdout", utterance.text], capture_output=True, check=False)
    if spoken.returncode != 0 or not spoken.stdout:
        reason = spoken.stderr.decode(errors="replace").strip()
        raise click.ClickException(f"espeak-ng as {utterance.voice!r} failed: {reason or 'no output'}")
    samples, rate_hz = soundfile.read(io.BytesIO(spoken.stdout), dtype="float32")
    samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)
    samples = _trimmed(samples * (PEAK / np.abs(samples).max()))
    quantised: NDArray[np.int16] = np.round(samples * 32768).astype(np.int16)
    return quantised


def _trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut leading and trailing silence, below -48 dB of the peak, down to 50 ms."""
    audible = np.flatnonzero(np.abs(samples) > PEAK * 0.004)
    margin = SAMPLE_RATE_HZ // 20
    return samples[max(0, audible[0] - margin) : audible[-1] + margin]


def as_float(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """16-bit samples (T,) as floats in [-1, 1), the values a reader of the FLAC file gets."""
    return samples.astype(np.float32) / np.float32(32768)


def write_flac(path: Path, samples: NDArray[np.int16]) -> None:
    """Write one clip, (T,) 16-bit samples, as mono FLAC at the highest compression."""
    soundfile.write(path, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16", compression_level=1.0)
