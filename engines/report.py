"""The parity report: every figure, every limit, one verdict; as JSON and as a table for people."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.limits import Limits
    from engines.parity import CaseResult, Measurement


class Verdict(str, Enum):
    """What a parity run found. An engine that could not be run here is never called passed."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EXECUTED = "built, not executed"


@dataclass(frozen=True)
class ParityReport:
    """Parity of one engine: the cases, and figures that belong to no case (`components`).

    `notes` are findings that judge nothing, a line each. `context` is free JSON for the reader (the plan, norms
    by block, versions).
    """

    backend: str
    precision: str
    limits: Limits
    components: tuple[Measurement, ...]
    cases: tuple[CaseResult, ...]
    context: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Passed when everything was run, keeps its limit and every control was caught."""
        if not self.cases:
            return Verdict.NOT_EXECUTED
        good = all(case.passed for case in self.cases) and all(item.passed for item in self.components)
        return Verdict.PASSED if good else Verdict.FAILED

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Every figure of the report."""
        return self.components + tuple(item for case in self.cases for item in case.measurements)

    def failures(self) -> list[str]:
        """What is wrong, a line each."""
        figures = [
            f"{item.case}: {item.what} is {item.value:.7g}, limit {item.limit:g} {item.detail}".rstrip()
            for item in self.measurements
            if not item.passed
        ]
        missed = [
            f"{case.case}: the control engine with {control.name} was not caught"
            for case in self.cases
            for control in case.controls
            if not control.passed
        ]
        return figures + missed

    def to_json(self) -> dict[str, Any]:
        """The report as JSON; figures that are not finite become strings."""
        return {
            "verdict": self.verdict.value,
            "backend": self.backend,
            "precision": self.precision,
            "limits": dataclasses.asdict(self.limits),
            "limits_source": self.limits.source,
            "failures": self.failures(),
            "notes": list(self.notes),
            "components": [_figure(item) for item in self.components],
            "cases": [
                {
                    "case": case.case,
                    "passed": case.passed,
                    "measurements": [_figure(item) for item in case.measurements],
                    "controls": [
                        {"name": control.name, "caught": control.passed, "caught_by": list(control.caught_by)}
                        for control in case.controls
                    ],
                    "effects": [
                        {name: _finite(value) for name, value in dataclasses.asdict(effect).items()}
                        for effect in case.effects
                    ],
                    "logits_difference": [_finite(value) for value in case.logits_difference],
                }
                for case in self.cases
            ],
            "context": self.context,
        }

    def table(self) -> str:
        """Figures and limits, worst over the cases of one kind, for a terminal."""
        worst: dict[tuple[str, str], Measurement] = {}
        for item in self.measurements:
            key = (item.case.rpartition(", ")[2], item.what)
            if key not in worst or _margin(item) < _margin(worst[key]):
                worst[key] = item
        rows = [
            (
                kind,
                what,
                f"{item.value:.3g}",
                f"{'>=' if item.at_least else '<='} {item.limit:g}",
                _mark(item.passed),
            )
            for (kind, what), item in worst.items()
            if what != "comparable" or not item.passed
        ]
        names = dict.fromkeys(control.name for case in self.cases for control in case.controls)
        for name in names:
            found = [c for case in self.cases for c in case.controls if c.name == name]
            caught = sum(control.passed for control in found)
            rows.append(
                ("control", name, f"{caught}/{len(found)}", "caught in all", _mark(caught == len(found)))
            )
        head = ("compared", "figure", "worst", "limit", "")
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
        closing = [*self.notes, f"verdict: {self.verdict.value}"]
        return "\n".join(line.rstrip() for line in [*lines, *closing])


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _margin(item: Measurement) -> float:
    difference = item.value - item.limit if item.at_least else item.limit - item.value
    return difference if math.isfinite(difference) else -math.inf


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _figure(item: Measurement) -> dict[str, Any]:
    fields = {name: _finite(value) for name, value in dataclasses.asdict(item).items()}
    return fields | {"passed": item.passed}
