"""The report of an evaluation: figures by system and runtime, as JSON and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sarsteer_export.evaluation.figures import FIGURES, HARMFUL, KL, KL_TITLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sarsteer_export.evaluation.agreement import Agreement
    from sarsteer_export.evaluation.intervals import Estimate

FORMAT, VERSION = "sarsteer-evaluation", 1
ALL_FIGURES = (*(figure.name for figure in FIGURES), KL)
MARK = "*"
"""Stands at intervals by formula."""


@dataclass(frozen=True)
class Row:
    """One system on one runtime.

    `figures`: by name, see `FIGURES`, and `kl` where damage was measured. `differences`: each share less that of the
    undefended system, paired by prompt; none for that system itself, and where it was not asked on this runtime.
    `plans`: the sha256 of each plan that it was asked with.
    """

    system: str
    kind: str
    runtime: str
    plans: tuple[str | None, ...]
    figures: dict[str, Estimate]
    differences: dict[str, Estimate] | None = None


@dataclass(frozen=True)
class OutputRecord:
    """One output: which system said it on which runtime, to which request, and how it was judged."""

    system: str
    runtime: str
    run: int
    requests: str
    index: int
    audio: str | None
    text: str
    transcript: str | None
    output: str
    verdict: str


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation found. `about`: model, data, judge, settings and versions, as JSON."""

    about: dict[str, Any]
    rows: tuple[Row, ...]
    agreements: tuple[Agreement, ...]
    notes: tuple[str, ...]
    outputs: tuple[OutputRecord, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, without the outputs."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **self.about,
            "systems": [asdict(row) for row in self.rows],
            "agreement": [asdict(found) for found in self.agreements],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The figures for a terminal: harmful requests, benign ones, agreement, notes."""
        blocks = [
            _aligned([["harmful requests", "runtime", *titles(harmful=True)], *self._cells(harmful=True)]),
            _aligned([["benign requests", "runtime", *titles(harmful=False)], *self._cells(harmful=False)]),
        ]
        if self.agreements:
            blocks.append("\n".join(agreement_lines(self.agreements)))
        if self.notes:
            blocks.append("\n".join(self.notes))
        return "\n\n".join(blocks)

    def markdown(self) -> str:
        """All figures in one Markdown table."""
        return "\n".join(markdown_rows(self.rows))

    def _cells(self, *, harmful: bool) -> list[list[str]]:
        return [[row.system, row.runtime, *cells(row, harmful=harmful)] for row in self.rows]


def figure_title(name: str) -> str:
    """What a table of both kinds of requests calls a figure."""
    if name == KL:
        return KL_TITLE
    figure = next(figure for figure in FIGURES if figure.name == name)
    return f"{figure.requests}: {figure.title}"


def titles(*, harmful: bool) -> list[str]:
    """The headings of one kind of requests."""
    found = [figure.title for figure in FIGURES if (figure.requests == HARMFUL) is harmful]
    return found if harmful else [*found, KL_TITLE]


def cells(row: Row, *, harmful: bool) -> list[str]:
    """The figures of one kind of requests, in the order of `titles`."""
    names = [figure.name for figure in FIGURES if (figure.requests == HARMFUL) is harmful]
    found = [_share_text(row.figures[name]) for name in names]
    return found if harmful else [*found, _kl_text(row.figures.get(KL))]


def markdown_rows(rows: Sequence[Row], names: Sequence[str] = ALL_FIGURES) -> list[str]:
    """The lines of a Markdown table: a heading, then a line per system and runtime with the named figures."""
    heads = [figure_title(name) for name in names]
    lines = [f"| system | runtime | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 2)}"]
    for row in rows:
        figures = [_text(name, row.figures.get(name)).replace(MARK, f"\\{MARK}") for name in names]
        lines.append(f"| {_in_cell(row.system)} | {row.runtime} | {' | '.join(figures)} |")
    return lines


def difference_rows(rows: Sequence[Row]) -> list[str]:
    """The same for what steering changes: every share less that of the undefended system, paired by prompt."""
    names = [figure.name for figure in FIGURES]
    lines = [
        f"| system | runtime | {' | '.join(map(figure_title, names))} |",
        f"|{' --- |' * (len(names) + 2)}",
    ]
    for row in rows:
        if row.differences is not None:
            figures = [_difference_text(row.differences[name]) for name in names]
            lines.append(f"| {_in_cell(row.system)} | {row.runtime} | {' | '.join(figures)} |")
    return lines


def agreement_lines(agreements: Sequence[Agreement]) -> list[str]:
    """How far two runtimes agree, a sentence per system."""
    return [
        f"eager and engine, {found.system}: {found.identical} of {found.total} outputs word for word the same, "
        f"{found.same_verdict} judged the same"
        for found in agreements
    ]


def any_marked(rows: Sequence[Row]) -> bool:
    """Whether a table of these rows shows an interval by formula."""
    return any(estimate.interval is estimate.formula for row in rows for estimate in row.figures.values())


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _text(name: str, estimate: Estimate | None) -> str:
    if name == KL or estimate is None:
        return _kl_text(estimate)
    return _share_text(estimate)


def _difference_text(estimate: Estimate) -> str:
    shown = estimate.interval
    mark = f"\\{MARK}" if shown is estimate.formula else ""
    return f"{estimate.value:+.2f} [{shown.low:+.2f}, {shown.high:+.2f}]{mark}"


def _share_text(estimate: Estimate) -> str:
    shown = estimate.interval
    mark = MARK if shown is estimate.formula else ""
    return f"{estimate.value:.2f} [{shown.low:.2f}, {shown.high:.2f}]{mark}"


def _kl_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    shown = estimate.interval
    return f"{estimate.value:.2g} [{shown.low:.2g}, {shown.high:.2g}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
