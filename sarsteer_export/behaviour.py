"""What a model says: refusals, answers and degenerate outputs, undefended and steered, eager and engine.

The short account that `build` gives of a bundle; `evaluation` has intervals, damage and random controls.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engines.backends import CPU_BACKEND
from sarsteer_export.evaluation.eager import EagerRespondent, eager_answers
from sarsteer_export.evaluation.engine import EngineRespondent
from sarsteer_export.evaluation.measure import MeasureSettings, Output, measure, work
from sarsteer_export.judges.judge import Behaviour, Judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from calibration.states import Progress
    from sarsteer_export.bundle.bundle import Bundle

__all__ = ["BATCH_SIZE", "BehaviourReport", "BehaviourRow", "eager_answers", "measure_behaviour"]

BATCH_SIZE = 16
"""Requests that are asked at once."""


@dataclass(frozen=True)
class BehaviourRow:
    """Counts of one kind of requests on one system."""

    system: str
    runtime: str
    requests: str
    count: int
    refusals: int
    answers: int
    degenerate: int


@dataclass(frozen=True)
class BehaviourReport:
    """All counts, and per system the share of requests that eager and engine answer with the same words."""

    rows: tuple[BehaviourRow, ...]
    identical: dict[str, float]
    examples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def table(self) -> str:
        """Shares in percent, for a terminal."""
        width = max(len(row.runtime) for row in self.rows) + 2
        head = f"{'requests':9}{'system':12}{'runtime':{width}}{'refused':>9}{'answered':>10}{'degenerate':>12}{'n':>5}"
        lines = [
            f"{row.requests:9}{row.system:12}{row.runtime:{width}}{row.refusals / row.count:>9.1%}"
            f"{row.answers / row.count:>10.1%}{row.degenerate / row.count:>12.1%}{row.count:>5}"
            for row in self.rows
        ]
        words = [
            f"eager and engine say the same, {system}: {share:.1%}"
            for system, share in self.identical.items()
        ]
        return "\n".join([head, *lines, *words])


def measure_behaviour(
    lalm: Lalm,
    bundle: Bundle,
    plan: SteeringPlan,
    requests: dict[str, Sequence[SpokenRequest]],
    judge: Judge,
    *,
    max_new_tokens: int = 32,
    batch_size: int = BATCH_SIZE,
    engine_name: str = CPU_BACKEND.name,
    progress: Progress | None = None,
) -> BehaviourReport:
    """Ask every request of every kind (`harmful`, `benign`) on the eager model and on the bundle.

    `plan`: what the eager model is steered by; the bundle has its own. `engine_name`: what the report calls that
    which runs the bundle.
    """
    eager, engine = EagerRespondent(lalm, force=True), EngineRespondent(bundle, engine_name)
    settings = MeasureSettings(max_new_tokens, batch_size)
    systems: dict[str, tuple[SteeringPlan | None, SteeringPlan | None]]
    systems = {"undefended": (None, None)} if bundle.has_unsteered else {}
    systems |= {"steered": (plan, bundle.plan)}
    done, total = 0, 2 * work(requests, len(systems), undefended_asked=False, damage=False)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("behaviour", done, total)

    rows: list[BehaviourRow] = []
    identical: dict[str, float] = {}
    examples: list[dict[str, Any]] = []
    for system, (eager_plan, engine_plan) in systems.items():
        ours = measure(eager, eager_plan, requests, judge, settings, advance=advance).outputs
        theirs = measure(engine, engine_plan, requests, judge, settings, advance=advance).outputs
        for kind, asked in requests.items():
            rows += [
                _count(system, eager.runtime, kind, ours[kind]),
                _count(system, engine_name, kind, theirs[kind]),
            ]
            said = {"transcript": asked[0].transcript, "output": theirs[kind][0].text}
            examples.append({"system": system, "requests": kind, **said})
        pairs = [pair for kind in requests for pair in zip(ours[kind], theirs[kind], strict=True)]
        identical[system] = sum(one.text == other.text for one, other in pairs) / len(pairs)
    order = list(requests)
    return BehaviourReport(
        tuple(sorted(rows, key=lambda row: order.index(row.requests))), identical, tuple(examples)
    )


def _count(system: str, runtime: str, kind: str, outputs: Sequence[Output]) -> BehaviourRow:
    verdicts = [output.verdict for output in outputs]
    return BehaviourRow(
        system=system,
        runtime=runtime,
        requests=kind,
        count=len(outputs),
        refusals=verdicts.count(Behaviour.REFUSAL),
        answers=verdicts.count(Behaviour.ANSWER),
        degenerate=verdicts.count(Behaviour.DEGENERATE),
    )
