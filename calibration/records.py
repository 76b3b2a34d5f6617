"""One record of a user's data: what it must hold, and what is said of those that do not hold it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

from calibration.audio import EmbeddedAudio, audio_sha256, check_header
from calibration.errors import BadRecordsError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from calibration.audio import AudioSource

NAMED = 10
"""How many bad records an error names; a warning about skipped ones names the first `WARNED`."""
WARNED = 3
DEFAULT_PROMPT = "Please answer the question in the audio."
"""The neutral text that goes with clips of data that has no place for one: folders of audio, reference lists."""

_logger = logging.getLogger(__name__)


class OnError(str, Enum):
    """What is done about bad records: `STOP` names them and ends, `SKIP` counts them and goes on without."""

    STOP = "stop"
    SKIP = "skip"


@dataclass(frozen=True)
class ReadSettings:
    """How data is read. Columns are the fields of JSON records, too.

    `prompt`: the text of records that have none. `audio_column`, `text_column`, `transcript_column`: names that
    differ from `audio`, `text` and `transcript`. `require_audio`: whether a record without audio is a bad one;
    models that hear nothing take text alone.
    """

    prompt: str | None = None
    audio_column: str | None = None
    text_column: str | None = None
    transcript_column: str | None = None
    on_error: OnError = OnError.STOP
    require_audio: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt", "audio_column", "text_column", "transcript_column"):
            value = getattr(self, name)
            if value is not None and not is_text(value):
                raise InputError(f"{name.replace('_', ' ')} is {value!r}; expected a text that is not empty")


@dataclass(frozen=True)
class SpokenRequest:
    """One request: a clip, the neutral text prompt that goes with it and, if known, what is said.

    `audio` is None for a request that is text alone. `where`: the record it comes from, for messages; no part of
    what the request is.
    """

    audio: AudioSource | None
    text: str
    transcript: str | None = None
    where: str | None = field(default=None, compare=False, repr=False)

    @cached_property
    def audio_sha256(self) -> bytes | None:
        """The sha256 of the clip's encoded bytes as they were when it was first asked for; None for text alone."""
        return None if self.audio is None else audio_sha256(self.audio)

    def clip(self) -> AudioSource:
        """The audio. Raises `InputError` for a request that is text alone."""
        if self.audio is None:
            raise InputError(f"{self.where or repr(self.text)}: is text alone; expected audio")
        return self.audio

    def __str__(self) -> str:
        place = () if self.where is None else (self.where,)
        return ": ".join([*place, f"audio {self.audio}" if self.audio is not None else "text alone"])


@dataclass(frozen=True)
class Record:
    """A record as it stands in a file: which one it is, and its fields by column."""

    where: str
    fields: Mapping[str, object]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.where in self.reason else f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordSource:
    """What a reader finds: records, the folder their paths start from, and which columns hold what.

    `prompt`: the text of records without one, for formats that have no place for it.
    """

    records: Iterable[Record | BadRecord]
    folder: Path
    audio: str
    text: str
    transcript: str
    prompt: str | None = None


def to_request(record: Record, source: RecordSource, settings: ReadSettings) -> SpokenRequest | BadRecord:
    """The request that a record holds, or what is wrong with it."""
    audio = record.fields.get(source.audio)
    text = record.fields.get(source.text)
    transcript = record.fields.get(source.transcript)
    if text is None:
        text = settings.prompt if settings.prompt is not None else source.prompt
    embedded = isinstance(audio, EmbeddedAudio)
    for name, value, required in (
        (source.audio, None if embedded else audio, settings.require_audio and not embedded),
        (source.text, text, True),
        (source.transcript, transcript, False),
    ):
        if value is None and not required:
            continue
        if not isinstance(value, str) or not value:
            return BadRecord(record.where, f"{name} is {value!r}; expected a non-empty string")
        if not is_text(value):
            return BadRecord(record.where, f"{name} is {value!r}, which is not valid text")
    found = audio if isinstance(audio, EmbeddedAudio) or audio is None else source.folder / str(audio)
    return SpokenRequest(found, str(text), None if transcript is None else str(transcript), record.where)


def is_text(value: object) -> bool:
    """Whether a value is a text that is not empty and that every program can hold."""
    return (
        isinstance(value, str)
        and bool(value)
        and not any("\ud800" <= character <= "\udfff" or character == "\0" for character in value)
    )


def check_audio_file(request: SpokenRequest) -> None:
    """Raise `InputError` for a request whose clip is missing or whose header cannot be read."""
    if request.audio is not None:
        check_header(request.audio)


def split_bad(
    requests: Sequence[SpokenRequest], check: Callable[[SpokenRequest], object], *, threads: int = 1
) -> tuple[list[SpokenRequest], list[BadRecord]]:
    """The requests for which `check` raises no `InputError`, and the others with what it says.

    Order is kept, also when several `threads` check.
    """

    def reason(request: SpokenRequest) -> str | None:
        try:
            check(request)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads) as pool:
        judged = list(zip(requests, pool.map(reason, requests), strict=True))
    good = [request for request, why in judged if why is None]
    bad = [BadRecord(one.where or str(one.audio), why) for one, why in judged if why is not None]
    return good, bad


def settle(source: str, bad: Sequence[BadRecord], total: int, on_error: OnError) -> None:
    """Refuse the bad records among `total`, or say on one line that they are skipped."""
    if not bad:
        return
    if on_error is OnError.STOP:
        refuse(source, bad, total)
    if len(bad) == total:
        raise BadRecordsError(
            f"{source}: every one of {total} records is bad; nothing is left:{_listed(bad)}"
        )
    rest = f" and {len(bad) - WARNED} more" if len(bad) > WARNED else ""
    named = "; ".join(map(str, bad[:WARNED]))
    _logger.warning("%s: %d of %d records skipped: %s%s", source, len(bad), total, named, rest)


def refuse(source: str, bad: Sequence[BadRecord], total: int) -> NoReturn:
    """Raise `InputError` naming bad records: one as itself, several in lines of their own."""
    if len(bad) == 1:
        raise InputError(str(bad[0]))
    raise BadRecordsError(
        f"{source}: {len(bad)} of {total} records are bad; mend them, or leave them out with --on-error skip:"
        + _listed(bad)
    )


def _listed(bad: Sequence[BadRecord]) -> str:
    rest = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    return "".join(f"\n  {line}" for line in [*map(str, bad[:NAMED]), *rest])
