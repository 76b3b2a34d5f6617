"""Spoken requests as users have them: files of records, Hugging Face data sets, folders of audio."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.audio import SILENCE_PEAK, AudioSource, EmbeddedAudio, load_audio
from calibration.errors import InputError
from calibration.readers.find import find_records
from calibration.records import (
    DEFAULT_PROMPT,
    BadRecord,
    OnError,
    ReadSettings,
    SpokenRequest,
    check_audio_file,
    settle,
    split_bad,
    to_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "DEFAULT_PROMPT",
    "SILENCE_PEAK",
    "AudioSource",
    "EmbeddedAudio",
    "OnError",
    "ReadSettings",
    "RequestSet",
    "SpokenRequest",
    "check_audio_files",
    "check_benign_count",
    "check_requests",
    "load_audio",
    "read_request_set",
    "read_requests",
    "requests_digest",
]


@dataclass(frozen=True)
class RequestSet:
    """The requests of one source, and the records that were skipped because they are bad."""

    source: str
    requests: tuple[SpokenRequest, ...]
    skipped: tuple[BadRecord, ...] = ()

    def checked(
        self, check: Callable[[SpokenRequest], object], on_error: OnError, *, threads: int = 1
    ) -> RequestSet:
        """The same without the requests for which `check` raises `InputError`, called by so many threads.

        Under `STOP` they are refused, all in one `InputError`; under `SKIP` one warning counts them.
        """
        good, bad = split_bad(self.requests, check, threads=threads)
        settle(self.source, bad, len(self.requests), on_error)
        return dataclasses.replace(self, requests=tuple(good), skipped=(*self.skipped, *bad))

    def summary(self) -> dict[str, int | str]:
        """What provenance keeps of the set: how many requests, how many skipped, the hash of their content."""
        return {
            "count": len(self.requests),
            "skipped": len(self.skipped),
            "sha256": requests_digest(self.requests),
        }


def read_request_set(
    path: str | Path, *, limit: int | None = None, seed: int = 0, settings: ReadSettings | None = None
) -> RequestSet:
    """Read data in any format of `docs/data.md`; `path` may end in `#SPLIT`. Clips are not opened yet.

    With more than `limit` requests a subset is drawn, the same for the same `seed`, in the order of the data. Raises
    `InputError` naming the bad records by their line or row, up to 10 of them, unless they are to be skipped, and
    `UnsupportedError` when reading this format needs a package that is not installed.
    """
    settings = settings or ReadSettings()
    source = find_records(path, settings)
    requests: list[SpokenRequest] = []
    bad: list[BadRecord] = []
    for record in source.records:
        found = record if isinstance(record, BadRecord) else to_request(record, source, settings)
        if isinstance(found, BadRecord):
            bad.append(found)
        else:
            requests.append(found)
    total = len(requests) + len(bad)
    if not total:
        raise InputError(f"{path}: holds no requests; expected at least one")
    settle(str(path), bad, total, settings.on_error)
    if limit is not None and len(requests) > limit:
        chosen = sorted(random.Random(seed).sample(range(len(requests)), limit))  # noqa: S311 - a subset, no secret
        requests = [requests[index] for index in chosen]
    return RequestSet(str(path), tuple(requests), tuple(bad))


def read_requests(
    path: str | Path, *, limit: int | None = None, seed: int = 0, settings: ReadSettings | None = None
) -> tuple[SpokenRequest, ...]:
    """The requests of `read_request_set`, without what was skipped."""
    return read_request_set(path, limit=limit, seed=seed, settings=settings).requests


def check_requests(requests: Sequence[SpokenRequest], check: Callable[[SpokenRequest], object]) -> None:
    """Raise one `InputError` that names every request (up to 10) for which `check` raises one."""
    _, bad = split_bad(requests, check)
    settle("requests", bad, len(requests), OnError.STOP)


def check_audio_files(requests: Sequence[SpokenRequest]) -> None:
    """Raise `InputError` naming clips that are missing or whose header cannot be read; samples are not."""
    check_requests(requests, check_audio_file)


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
        if (clip := request.audio_sha256) is not None:
            digest.update(clip)
    return digest.hexdigest()
