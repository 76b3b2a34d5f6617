"""Whether two runtimes say the same, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.requests import SpokenRequest
    from sarsteer_export.evaluation.measure import Measured


@dataclass(frozen=True)
class Agreement:
    """How many of `total` outputs of one system are word for word the same on two runtimes, and judged the same.

    `different`: the others, each with its request and what both said.
    """

    system: str
    total: int
    identical: int
    same_verdict: int
    different: tuple[dict[str, Any], ...]


def agreement(
    system: str,
    requests: dict[str, Sequence[SpokenRequest]],
    eager: Sequence[Measured],
    engine: Sequence[Measured],
) -> Agreement:
    """Compare what one system said on eager and on an engine; of several random controls, each with its own."""
    total = same_verdict = 0
    different: list[dict[str, Any]] = []
    for number, (ours, theirs) in enumerate(zip(eager, engine, strict=True)):
        for kind, asked in requests.items():
            for index, request in enumerate(asked):
                wanted, seen = ours.outputs[kind][index], theirs.outputs[kind][index]
                total += 1
                same_verdict += wanted.verdict is seen.verdict
                if wanted.text != seen.text:
                    different.append(
                        {
                            "requests": kind,
                            "index": index,
                            "run": number,
                            "transcript": request.transcript,
                            "eager": {"output": wanted.text, "verdict": wanted.verdict.value},
                            "engine": {"output": seen.text, "verdict": seen.verdict.value},
                        }
                    )
    return Agreement(system, total, total - len(different), same_verdict, tuple(different))
