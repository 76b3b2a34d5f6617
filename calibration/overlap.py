"""Requests that stand where they must not: in train and test, in harmful and benign, twice in one set.

Two requests are the same *clip* when the bytes of their audio files are equal, and have the same *transcript*
when what is said is equal after `normalised`. A request that is text alone says its text.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from calibration.errors import BadRecordsError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from calibration.plan import SteeringPlan
    from calibration.records import SpokenRequest

SEEN = "seen"
"""The entry of a plan's provenance that says on what it was calibrated."""
DIGEST_CHARACTERS = 16
"""Hex digits of a sha256 that a plan keeps: 64 bits, so that among millions none are equal by chance."""
MOST_SEEN = 4096
"""Digests that a plan keeps of each kind, 70 kB; of more, the smallest, which are a fair sample."""
NAMED = 10
APOSTROPHES = "'\u2019\u02bc\uff07"

_logger = logging.getLogger(__name__)


class AllowedOverlap(str, Enum):
    """What a test set may share with the calibration set.

    `TRANSCRIPTS`: the same words in other clips. `ALL`: the same clips, too; figures then say nothing of new ones.
    """

    NONE = "none"
    TRANSCRIPTS = "transcripts"
    ALL = "all"


@dataclass(frozen=True)
class Overlap:
    """What requests of a test set were calibrated on: by clip, by transcript. A request may be in both."""

    clips: tuple[str, ...] = ()
    transcripts: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many test requests of each kind."""
        return {"clips": len(self.clips), "transcripts": len(self.transcripts)}

    def text(self) -> str:
        """The counts for people."""
        return f"{len(self.clips)} by clip, {len(self.transcripts)} by transcript"


@dataclass(frozen=True)
class _Digests:
    clips: Mapping[str, str]
    transcripts: Mapping[str, str]


def normalised(transcript: str) -> str:
    """A transcript without what ears do not hear: compatibility forms, case, punctuation, spacing.

    Apostrophes vanish (`don't` is `dont`); every other character that is no letter, mark or number parts words.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", transcript).casefold())
    kept = (
        character if unicodedata.category(character)[0] in "LMN" else " "
        for character in folded
        if character not in APOSTROPHES
    )
    return " ".join("".join(kept).split())


def check_disjoint(
    train: Sequence[SpokenRequest],
    test: Sequence[SpokenRequest],
    allowed: AllowedOverlap = AllowedOverlap.NONE,
) -> Overlap:
    """Raise `InputError` naming test requests that calibration saw; what is allowed is warned of and returned."""
    return _judged(_overlap(_digests(train), test), test, allowed)


def check_unseen(
    plan: SteeringPlan, test: Sequence[SpokenRequest], allowed: AllowedOverlap = AllowedOverlap.NONE
) -> Overlap:
    """The same against what a plan says it was calibrated on; one that does not say so is warned of.

    A plan calibrated on more than `MOST_SEEN` clips knows a sample of them. Raises `InputError` also when the
    entry is not what `seen_digests` writes.
    """
    found = plan.provenance.get(SEEN)
    if found is None:
        _logger.warning(
            "the plan does not say what it was calibrated on: whether the test set holds it is not known"
        )
        return Overlap()
    kinds = [found.get(kind) if isinstance(found, dict) else None for kind in ("clips", "transcripts")]
    if not all(isinstance(kind, list) and all(isinstance(digest, str) for digest in kind) for kind in kinds):
        raise InputError(
            f"the plan's provenance has an entry {SEEN!r} that is no object with clips and transcripts, lists of "
            "digests; take the entry out or calibrate again"
        )
    clips, transcripts = (dict.fromkeys(kind or (), "the plan's calibration") for kind in kinds)
    return _judged(_overlap(_Digests(clips, transcripts), test), test, allowed)


def seen_digests(requests: Sequence[SpokenRequest]) -> dict[str, Any]:
    """What a plan remembers of its calibration set: digests of clips and transcripts, sorted, bounded."""
    digests = _digests(requests)
    return {
        "clips": sorted(digests.clips)[:MOST_SEEN],
        "transcripts": sorted(digests.transcripts)[:MOST_SEEN],
    }


def check_kinds(harmful: Sequence[SpokenRequest], benign: Sequence[SpokenRequest]) -> None:
    """Refuse a clip that is in both sets, warn of transcripts that are in both and of requests given twice."""
    for kind, requests in (("harmful", harmful), ("benign", benign)):
        distinct = {(clip_digest(request), request.text) for request in requests}
        if twice := len(requests) - len(distinct):
            _logger.warning("%d of %d %s requests are copies of others", twice, len(requests), kind)
    shared = _overlap(_digests(harmful), benign)
    if shared.clips:
        what = "benign requests are clips that are harmful ones, too"
        _refuse(what, shared.clips, len(benign), "take them out of one set")
    if shared.transcripts:
        _logger.warning(
            "%d of %d benign requests say what a harmful one says, such as %s",
            *(len(shared.transcripts), len(benign), shared.transcripts[0]),
        )


def clip_digest(request: SpokenRequest) -> str | None:
    """The digest of a request's clip; None when it has none."""
    clip = request.audio_sha256
    return None if clip is None else clip.hex()[:DIGEST_CHARACTERS]


def transcript_digest(request: SpokenRequest) -> str | None:
    """The digest of what a request says; None when that is not known."""
    said = request.text if request.audio is None else request.transcript
    words = normalised(said or "")
    return hashlib.sha256(words.encode()).hexdigest()[:DIGEST_CHARACTERS] if words else None


def _digests(requests: Iterable[SpokenRequest]) -> _Digests:
    clips: dict[str, str] = {}
    transcripts: dict[str, str] = {}
    for request in requests:
        for digest, known in ((clip_digest(request), clips), (transcript_digest(request), transcripts)):
            if digest is not None:
                known.setdefault(digest, _place(request))
    return _Digests(clips, transcripts)


def _overlap(train: _Digests, test: Iterable[SpokenRequest]) -> Overlap:
    clips: list[str] = []
    transcripts: list[str] = []
    for request in test:
        for digest, known, shared, what in (
            (clip_digest(request), train.clips, clips, "clip"),
            (transcript_digest(request), train.transcripts, transcripts, "transcript"),
        ):
            if digest is not None and digest in known:
                shared.append(f"{_place(request)}: the {what} of {known[digest]}")
    return Overlap(tuple(clips), tuple(transcripts))


def _judged(found: Overlap, test: Sequence[SpokenRequest], allowed: AllowedOverlap) -> Overlap:
    if found.clips and allowed is not AllowedOverlap.ALL:
        _refuse(
            "test requests are clips that calibration saw",
            found.clips,
            len(test),
            "hold other ones out; --allow-overlap all measures all the same, which says nothing of new requests",
        )
    if found.transcripts and allowed is AllowedOverlap.NONE:
        _refuse(
            "test requests say what calibration heard",
            found.transcripts,
            len(test),
            "hold other ones out, or allow the same words in other clips with --allow-overlap transcripts",
        )
    if found.clips or found.transcripts:
        _logger.warning("calibration saw test requests: %s, of %d; allowed", found.text(), len(test))
    return found


def _refuse(what: str, named: Sequence[str], total: int, remedy: str) -> None:
    rest = [f"and {len(named) - NAMED} more"] if len(named) > NAMED else []
    lines = "".join(f"\n  {line}" for line in [*named[:NAMED], *rest])
    raise BadRecordsError(f"{len(named)} of {total} {what}; {remedy}:{lines}")


def _place(request: SpokenRequest) -> str:
    return request.where or (request.text if request.audio is None else str(request.audio))
