"""Ask a respondent, judge what it says, and measure the damage: the tool of `evaluate`, of `build` and of sweeps.

`undefended` asks once without steering; its answers and continuations serve every `measure` after it.

Dimensions: N requests, B requests of a batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import InputError
from sarsteer_export.judges.judge import Behaviour, Exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from sarsteer_export.evaluation.respondent import Reply, Respondent, Speaker
    from sarsteer_export.judges.judge import Judge

    Advance = Callable[[int], None]

KEPT_BYTES = 1 << 30
"""Undefended log-probabilities are kept up to this size, and computed again for every plan beyond it."""


@dataclass(frozen=True)
class MeasureSettings:
    """`max_new_tokens`: the longest answer. `batch_size`: requests asked at once."""

    max_new_tokens: int = 128
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Output:
    """What was said to one request, and what the judge makes of it."""

    text: str
    verdict: Behaviour


@dataclass(frozen=True)
class Damage:
    """KL(undefended || steered) in nats on undefended answers to benign requests.

    `sums`: over the tokens of each answer (N,). `tokens`: how many each has (N,), its end included.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One system on one runtime: its outputs by kind of request (`harmful`, `benign`), and its damage if known."""

    outputs: dict[str, tuple[Output, ...]]
    damage: Damage | None = None


@dataclass(frozen=True)
class Continuation:
    """Undefended answers to a batch of requests: their tokens and, where they were kept, their log-probabilities.

    `log_probabilities`: of every next token, per step (B, V).
    """

    requests: tuple[SpokenRequest, ...]
    tokens: tuple[tuple[int, ...], ...]
    log_probabilities: tuple[NDArray[np.float32], ...] | None


@dataclass(frozen=True)
class Reference:
    """The undefended system, and what damage is measured on."""

    measured: Measured
    continuations: tuple[Continuation, ...] = field(repr=False)


def undefended(
    respondent: Respondent,
    requests: dict[str, Sequence[SpokenRequest]],
    judge: Judge,
    settings: MeasureSettings,
    *,
    advance: Advance | None = None,
) -> Reference:
    """Ask every request without steering, and keep what `measure` compares with.

    `requests`: by kind, `harmful` and `benign`. `advance` is told of every batch: how many requests it had.
    """
    continuations: list[Continuation] = []
    room = KEPT_BYTES
    with respondent.speaker(None) as speaker:
        outputs: dict[str, tuple[Output, ...]] = {}
        for kind, asked in requests.items():
            said: list[Output] = []
            for batch in _batches(asked, settings.batch_size):
                replies = speaker.replies(batch, max_new_tokens=settings.max_new_tokens)
                said += _judged(batch, replies, judge)
                if kind == "benign":
                    tokens = tuple(reply.tokens for reply in replies)
                    kept = None
                    if room > 0:
                        kept = tuple(speaker.log_probabilities(batch, tokens))
                        room -= sum(step.nbytes for step in kept)
                    continuations.append(Continuation(tuple(batch), tokens, kept))
                _advance(advance, len(batch))
            outputs[kind] = tuple(said)
    return Reference(Measured(outputs), tuple(continuations))


def measure(
    respondent: Respondent,
    plan: SteeringPlan | None,
    requests: dict[str, Sequence[SpokenRequest]],
    judge: Judge,
    settings: MeasureSettings,
    *,
    reference: Reference | None = None,
    advance: Advance | None = None,
) -> Measured:
    """Ask every request of the model as `plan` steers it; with a `reference`, measure the damage too.

    Damage is measured step by step with the cache, the undefended answers forced: steering acts in every pass, at
    its last position.
    """
    with respondent.speaker(plan) as speaker:
        outputs = {
            kind: tuple(_outputs(speaker, asked, judge, settings, advance))
            for kind, asked in requests.items()
        }
        damage = None if reference is None else _damage(respondent, speaker, reference, advance)
    return Measured(outputs, damage)


def work(
    requests: dict[str, Sequence[SpokenRequest]], systems: int, *, undefended_asked: bool, damage: bool
) -> int:
    """How many requests `advance` will be told of by one `undefended` and `systems` calls of `measure`."""
    asked = sum(map(len, requests.values()))
    again = len(requests.get("benign", ())) if damage else 0
    return undefended_asked * asked + systems * (asked + again)


def divergence(base_BV: NDArray[np.float32], ours_BV: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(base || ours) in nats (B,), of log-probabilities; infinite where ours rules out what base does not."""
    base, ours = base_BV.astype(np.float64), ours_BV.astype(np.float64)
    probable = np.exp(base)
    with np.errstate(invalid="ignore"):  # -inf - -inf, of a token that neither gives
        terms = np.where(probable > 0, probable * (base - ours), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0))  # rounding may leave less than 0


def _damage(
    respondent: Respondent, speaker: Speaker, reference: Reference, advance: Advance | None
) -> Damage:
    sums: list[NDArray[np.float64]] = []
    lengths: list[int] = []
    for continuation in reference.continuations:
        requests, tokens = continuation.requests, continuation.tokens
        base = continuation.log_probabilities
        if base is None:
            with respondent.speaker(None) as plain:
                base = tuple(plain.log_probabilities(requests, tokens))
        ours = speaker.log_probabilities(requests, tokens)
        length_B = np.array([len(row) for row in tokens])
        sum_B = np.zeros(len(tokens))
        for step, (base_BV, ours_BV) in enumerate(zip(base, ours, strict=True)):
            sum_B += np.where(step < length_B, divergence(base_BV, ours_BV), 0.0)
        sums.append(sum_B)
        lengths += length_B.tolist()
        _advance(advance, len(tokens))
    return Damage(np.concatenate(sums), np.array(lengths, dtype=np.float64))


def _outputs(
    speaker: Speaker,
    asked: Sequence[SpokenRequest],
    judge: Judge,
    settings: MeasureSettings,
    advance: Advance | None,
) -> Iterator[Output]:
    for batch in _batches(asked, settings.batch_size):
        yield from _judged(batch, speaker.replies(batch, max_new_tokens=settings.max_new_tokens), judge)
        _advance(advance, len(batch))


def _judged(batch: Sequence[SpokenRequest], replies: Sequence[Reply], judge: Judge) -> list[Output]:
    exchanges = [
        Exchange(reply.text, request.text if request.audio is None else request.transcript)
        for request, reply in zip(batch, replies, strict=True)
    ]
    return [
        Output(exchange.output, verdict)
        for exchange, verdict in zip(exchanges, judge.judge(exchanges), strict=True)
    ]


def _batches(asked: Sequence[SpokenRequest], size: int) -> Iterator[Sequence[SpokenRequest]]:
    return (asked[start : start + size] for start in range(0, len(asked), size))


def _advance(advance: Advance | None, count: int) -> None:
    if advance is not None:
        advance(count)
