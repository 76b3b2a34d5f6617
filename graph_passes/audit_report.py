"""What an audit finds: a word per edit, and whatever else stands in the stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.plan import Site


class Finding(str, Enum):
    """How an edit of the plan stands in a graph.

    `PRESENT`: as the plan lowers, and whatever the stream feeds reads it. `MISSING`: nothing stands where it should.
    `ALTERED`: something else does, or stands beside it. `BYPASSED`: it is there, and something reads past it.
    """

    PRESENT = "present"
    MISSING = "missing"
    ALTERED = "altered"
    BYPASSED = "bypassed"


@dataclass(frozen=True)
class AuditedEdit:
    """One edit of the plan and how it was found; `scope`: the body of an `If`, empty for the graph itself."""

    number: int
    layer: int
    site: Site
    op: str
    positions: str
    strength: float
    finding: Finding
    detail: str
    scope: str = ""


@dataclass(frozen=True)
class FoundStep:
    """A step that stands on the stream: where, and what it does."""

    place: str
    what: str
    node: str
    scope: str = ""


@dataclass(frozen=True)
class AuditReport:
    """What was found in a graph.

    `edits`: one entry per edit and scope; none when no plan was asked for. `steps`: all that stands on the stream.
    `unexpected`: what makes the audit fail though it is no edit's. `notes`: what a reader must know, and what the file
    says of itself.
    """

    edits: tuple[AuditedEdit, ...]
    steps: tuple[FoundStep, ...]
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    plan_sha256: str | None = None
    on_paper: bool = False

    @property
    def passed(self) -> bool:
        """Whether every edit is present and nothing else was found; without a plan, whether anything stands there."""
        if self.plan_sha256 is None:
            return (bool(self.steps) or self.on_paper) and not self.unexpected
        return (
            (bool(self.edits) or self.on_paper)
            and not self.unexpected
            and all(edit.finding is Finding.PRESENT for edit in self.edits)
        )

    def failures(self) -> list[str]:
        """Why it did not pass, a line each."""
        lines = [
            f"edit {edit.number} ({_place(edit)}) is {edit.finding.value}: {edit.detail}"
            for edit in self.edits
            if edit.finding is not Finding.PRESENT
        ]
        lines += self.unexpected
        return lines or ([] if self.passed else ["no steering stands on the residual stream"])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"passed": self.passed, **dataclasses.asdict(self), "failures": self.failures()}

    def table(self) -> str:
        """The report for people."""
        lines = [
            f"edit {edit.number:3}  {_place(edit)}  {edit.op:8} {edit.positions:10} {edit.finding.value:9} "
            f"{edit.detail}"
            for edit in self.edits
        ]
        if self.plan_sha256 is None and not self.on_paper:
            lines += [
                f"{step.place:24} {step.what}, at {step.node}{_in(step.scope)}" for step in self.steps
            ] or ["no steering stands on the residual stream"]
        lines += [f"unexpected: {text}" for text in self.unexpected]
        lines += [f"note: {note}" for note in self.notes]
        if self.plan_sha256 is not None and not self.on_paper:
            present = sum(edit.finding is Finding.PRESENT for edit in self.edits)
            lines.append(f"{present} of {len(self.edits)} edits of plan {self.plan_sha256[:12]} are present")
        return "\n".join(line.rstrip() for line in lines)


def _place(edit: AuditedEdit) -> str:
    return f"block {edit.layer:3}  {edit.site.value:18}{_in(edit.scope)}"


def _in(scope: str) -> str:
    return f" in {scope}" if scope else ""
