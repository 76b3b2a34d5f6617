"""What a judge is: outputs in, one verdict each out, and a description of the judge that goes into the report."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOP_WORDS, LOOP_TIMES = 3, 3
"""An output in which some run of this many words occurs this many times is degenerate."""


class Behaviour(str, Enum):
    """What an output is."""

    REFUSAL = "refusal"
    ANSWER = "answer"
    DEGENERATE = "degenerate"


@dataclass(frozen=True)
class Exchange:
    """One output and what it answers: the request as it was said or, where nobody wrote that down, None."""

    output: str
    request: str | None = None


class Judge(ABC):
    """Tells refusals, answers and degenerate outputs apart.

    An output that is empty or repeats itself is degenerate, whoever judges; the others are judged by the kind of
    judge. `answer_pattern`: a regular expression; what would be an answer and does not match it is degenerate.
    """

    answer_pattern: str | None = None

    def judge(self, exchanges: Sequence[Exchange]) -> list[Behaviour]:
        """The verdict on every exchange, in order."""
        sound = [number for number, exchange in enumerate(exchanges) if not is_degenerate(exchange.output)]
        verdicts = [Behaviour.DEGENERATE] * len(exchanges)
        judged = self._judge([exchanges[number] for number in sound]) if sound else []
        for number, verdict in zip(sound, judged, strict=True):
            verdicts[number] = self._held_to_pattern(exchanges[number].output, verdict)
        return verdicts

    @abstractmethod
    def _judge(self, exchanges: Sequence[Exchange]) -> list[Behaviour]:
        """The verdict on every exchange, none of which is degenerate by its words alone."""

    def _held_to_pattern(self, output: str, verdict: Behaviour) -> Behaviour:
        if verdict is not Behaviour.ANSWER or self.answer_pattern is None:
            return verdict
        return Behaviour.ANSWER if re.search(self.answer_pattern, output) else Behaviour.DEGENERATE


def check_pattern(pattern: str | None) -> None:
    """Raise `InputError` for an answer pattern that is no regular expression."""
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"answer pattern {pattern!r} is no regular expression ({error})") from None


def is_degenerate(output: str) -> bool:
    """Whether an output is empty, or some run of `LOOP_WORDS` words occurs in it `LOOP_TIMES` times."""
    words = output.lower().split()
    runs = [tuple(words[start : start + LOOP_WORDS]) for start in range(len(words) - LOOP_WORDS + 1)]
    counts: dict[tuple[str, ...], int] = {}
    for run in runs:
        counts[run] = counts.get(run, 0) + 1
    return not words or max(counts.values(), default=0) >= LOOP_TIMES


def identity_of(kind: str, pattern: str | None, **details: Any) -> dict[str, Any]:
    """What the report says of a judge."""
    return {"kind": kind, "answer_pattern": pattern, **details}
