"""Clips: audio files, or audio that lies inside a data set, read when it is needed and not before."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import soundfile
import soxr

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SILENCE_PEAK = 1e-4
"""A clip whose loudest sample is below this (−80 dB of full scale) holds no speech."""
MAYBE_SHORT_SECONDS = 0.5
"""Clips shorter than this are checked for whether the audio encoder makes anything of them."""
AUDIO_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
"""Names that audio files in a folder have; what a record names may be called anything."""
UNREADABLE = "not a readable audio file; expected wav, flac, mp3, ogg or another format of libsndfile"

_READING = Lock()


@dataclass(frozen=True)
class EmbeddedAudio:
    """An encoded audio file inside a data set: its name for people, and how to get at its bytes.

    `read` raises `InputError`. Two are equal when their names are: a name says where the clip is.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def read_bytes(self) -> bytes:
        """The encoded file, read anew each time, by one thread at a time: readers keep what they read last."""
        with _READING:
            return self.read()

    def __str__(self) -> str:
        return self.name


AudioSource: TypeAlias = Path | EmbeddedAudio
"""Where a clip is. Both have `name`, `read_bytes()` and a `str()` that tells people which one it is."""


def load_audio(
    source: str | AudioSource, *, sampling_rate: int, max_seconds: float | None = None
) -> NDArray[np.float32]:
    """Read a clip as mono float32 samples at `sampling_rate` Hz, shape (samples,).

    Any format libsndfile reads, any rate and channel count; channels are averaged. Raises `InputError` when the
    clip is missing, not audio, empty, silent or longer than `max_seconds`.
    """
    try:
        samples_TC, rate = soundfile.read(_opened(source), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise InputError(f"audio {source}: {UNREADABLE} ({error})") from error
    samples = samples_TC.mean(axis=1)
    if samples.size == 0:
        raise InputError(f"audio {source}: holds no samples")
    if not np.isfinite(samples).all():
        raise InputError(f"audio {source}: holds samples that are NaN or infinite")
    if np.abs(samples).max() < SILENCE_PEAK:
        raise InputError(f"audio {source}: is silent (every sample below {SILENCE_PEAK})")
    seconds = samples.size / rate
    if max_seconds is not None and seconds > max_seconds:
        raise InputError(
            f"audio {source}: lasts {seconds:.2f} s; the model hears at most {max_seconds:g} s; cut it"
        )
    if rate != sampling_rate:
        samples = soxr.resample(samples, rate, sampling_rate)
        if samples.size == 0:
            raise InputError(f"audio {source}: holds no samples at {sampling_rate} Hz; it is too short")
    return np.ascontiguousarray(samples, dtype=np.float32)


def check_header(source: AudioSource) -> None:
    """Raise `InputError` naming a clip that is missing or whose header cannot be read; samples are not."""
    try:
        soundfile.info(_opened(source))
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise InputError(f"audio {source}: {UNREADABLE} ({error})") from error


def audio_sha256(source: AudioSource) -> bytes:
    """The sha256 of a clip's encoded bytes: equal for copies of a file, whatever they are called."""
    try:
        return hashlib.sha256(source.read_bytes()).digest()
    except OSError as error:
        raise InputError(f"audio {source}: cannot be read ({error.strerror})") from error


def _opened(source: str | AudioSource) -> Any:
    """What soundfile takes. libsndfile tells formats by their content, not by their names."""
    if isinstance(source, EmbeddedAudio):
        return io.BytesIO(source.read_bytes())
    if not Path(source).is_file():
        raise InputError(f"audio {source}: no such file")
    return source
