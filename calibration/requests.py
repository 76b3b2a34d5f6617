"""Spoken requests as users have them: JSON Lines that point to audio files."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import soxr

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SILENCE_PEAK = 1e-4
"""A clip whose loudest sample is below this (−80 dB of full scale) holds no speech."""


@dataclass(frozen=True)
class SpokenRequest:
    """One request: an audio clip, the neutral text prompt that goes with it and, if known, what is said."""

    audio: Path
    text: str
    transcript: str | None = None


def read_requests(path: str | Path, *, limit: int | None = None, seed: int = 0) -> tuple[SpokenRequest, ...]:
    """Read a JSON Lines file with `audio` (relative to the file), `text` and optionally `transcript`.

    With more than `limit` requests a subset is drawn, the same for the same `seed`, in file order. Raises
    `InputError` naming the file and line.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read as UTF-8 text ({error})") from error
    requests = [
        _parse(f"{source}, line {number}", line, source.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise InputError(f"{source}: holds no requests; expected one JSON object a line")
    if limit is not None and len(requests) > limit:
        chosen = sorted(random.Random(seed).sample(range(len(requests)), limit))  # noqa: S311 - a subset, no secret
        requests = [requests[index] for index in chosen]
    return tuple(requests)


def load_audio(
    path: str | Path, *, sampling_rate: int, max_seconds: float | None = None
) -> NDArray[np.float32]:
    """Read a clip as mono float32 samples at `sampling_rate` Hz, shape (samples,).

    Any format libsndfile reads, any rate and channel count. Raises `InputError` when the file is missing,
    not audio, empty, silent or longer than `max_seconds`.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"audio {source}: no such file")
    try:
        samples_TC, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"audio {source}: not a readable audio file ({error})") from error
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


def check_audio_files(requests: Sequence[SpokenRequest]) -> None:
    """Raise `InputError` naming a clip that is missing or whose header cannot be read; samples are not."""
    for request in requests:
        if not request.audio.is_file():
            raise InputError(f"audio {request.audio}: no such file")
        try:
            soundfile.info(request.audio)
        except (soundfile.SoundFileError, OSError) as error:
            raise InputError(f"audio {request.audio}: not a readable audio file ({error})") from error


def check_benign_count(benign: Sequence[SpokenRequest], source: str | Path) -> None:
    """Raise `InputError` when there are too few benign requests to span a safe subspace."""
    if len(benign) < 2:
        raise InputError(
            f"{source}: {len(benign)} benign request; expected at least 2 to span a safe subspace"
        )


def requests_digest(requests: Sequence[SpokenRequest]) -> str:
    """Content hash (hex sha256) of requests: prompts and the bytes of their audio, not their paths."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps([request.text, request.transcript]).encode())
        try:
            digest.update(hashlib.sha256(request.audio.read_bytes()).digest())
        except OSError as error:
            raise InputError(f"audio {request.audio}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _parse(where: str, line: str, folder: Path) -> SpokenRequest:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {type(record).__name__}; expected an object with audio and text")
    for name, required in (("audio", True), ("text", True), ("transcript", False)):
        value = record.get(name)
        if value is None and not required:
            continue
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {name} is {value!r}; expected a non-empty string")
        if any("\ud800" <= character <= "\udfff" or character == "\0" for character in value):
            raise InputError(f"{where}: {name} is {value!r}, which is not valid text")
    return SpokenRequest(folder / record["audio"], record["text"], record.get("transcript"))
