"""The report of a sweep: every point, the limits, the choice, as JSON and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sarsteer_export.evaluation.figures import FIGURES, HARMFUL, KL, KL_TITLE
from sarsteer_export.sweeping.choice import Candidates, Choice, Judged, nearest
from sarsteer_export.sweeping.pareto import pareto_front

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sarsteer_export.sweeping.grid import Grid, Line
    from sarsteer_export.sweeping.limits import Limits
    from sarsteer_export.sweeping.points import Figures, Point, Reading

FORMAT, VERSION = "sarsteer-sweep", 1
TABLE_ROWS = 24
"""Alphas of the longest table that shows all of them; of longer grids it shows every n-th, and the chosen one."""
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep found. `inputs`: all that the points depend on beside their settings, as JSON.

    `undefended`: the figures without steering. `points`: in the order of the grid; alphas that were given up on a
    line are not among them. `plan`: the sha256 of the chosen plan, None where no setting is usable.
    """

    inputs: dict[str, Any]
    overlap: dict[str, int]
    grid: Grid
    limits: Limits
    candidates: Candidates
    early_stop: int
    undefended: Figures
    points: tuple[Point, ...]
    choice: Choice
    plan: str | None = None

    @property
    def judged(self) -> dict[Line, list[Judged]]:
        """The measured alphas of every line, and the limits that each breaks."""
        return judged_lines(self.points, self.limits, self.undefended)

    @property
    def chosen(self) -> Point | None:
        """The chosen point."""
        return self.point(self.choice.line, self.choice.alpha)

    def point(self, line: Line | None, alpha: float | None) -> Point | None:
        """A measured point; None where there is none."""
        return next((point for point in self.points if (point.line, point.alpha) == (line, alpha)), None)

    @property
    def given_up(self) -> int:
        """How many settings of the grid were not measured."""
        return len(self.grid.lines) * len(self.grid.alphas) - len(self.points)

    def summary(self) -> dict[str, Any]:
        """What the plan keeps of the sweep that chose it."""
        line, point = self.choice.line, self.chosen
        run = None if line is None else self.choice.runs[line]
        return {
            "settings": len(self.points),
            "limits": asdict(self.limits),
            "candidates": self.candidates.value,
            "usable_alphas": None if run is None else {"first": run.alphas[0], "last": run.alphas[-1]},
            "figures": None if point is None else point.to_json()["figures"],
            "judge": self.inputs["judge"],
            **{name: self.inputs[name] for name in ("eval_harmful", "eval_benign")},
        }

    def to_json(self) -> dict[str, Any]:
        """The report as JSON; null stands for numbers that are not finite."""
        front = pareto_front(self.points, KL)
        usable = {
            (line, judged.alpha): judged.usable for line, found in self.judged.items() for judged in found
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "inputs": self.inputs,
            "overlap": self.overlap,
            "grid": {
                "alphas": list(self.grid.alphas),
                "lambdas": list(self.grid.ablations),
                "ranks": list(self.grid.ranks),
                "layer_sets": [None if layers is None else list(layers) for layers in self.grid.layer_sets],
            },
            "limits": asdict(self.limits),
            "candidates": self.candidates.value,
            "early_stop": self.early_stop,
            "given_up": self.given_up,
            "chosen": None if self.chosen is None else self.chosen.to_json() | {"plan": self.plan},
            "runs": [
                {
                    "lambda": line.ablation,
                    "rank": line.rank,
                    "layers": None if line.layers is None else list(line.layers),
                    "alphas": list(run.alphas),
                    "width": run.width,
                    "middle": run.middle,
                }
                for line, run in self.choice.runs.items()
            ],
            "undefended": _figures_json(self.undefended),
            "points": [
                point.to_json() | {"usable": usable[point.line, point.alpha], "pareto": point in front}
                for point in self.points
            ],
            "notes": self.notes(),
        }

    def table(self) -> str:
        """For a terminal: the verdict, the runs, the figures of what was chosen beside the undefended ones."""
        rows = [["line", "usable alphas", "last / first", "middle"], *self._run_rows()]
        return "\n\n".join(["\n".join(self.verdict()), aligned(rows), "\n".join(self.notes())]).rstrip("\n")

    def verdict(self) -> list[str]:
        """What was chosen with its figures, or what stands nearest and what that breaks."""
        line, alpha, point = self.choice.line, self.choice.alpha, self.chosen
        if line is None or alpha is None or point is None:
            return [self.nothing_usable()]
        return [
            f"chosen: {line.title}, alpha {alpha:g}",
            *(f"  {title}: {text}, undefended {bare}" for title, text, bare in self._figure_rows(point)),
        ]

    def nothing_usable(self) -> str:
        """The setting that breaks the limits least, and how."""
        line, point = nearest(self.judged)
        broken = "; ".join(violation.text for violation in point.violations)
        return f"no setting is usable; nearest is {line.title}, alpha {point.alpha:g}: {broken}"

    def notes(self) -> list[str]:
        """What a reader of the tables needs to know."""
        limits = self.limits
        kl = "" if limits.max_kl is None else f", {KL_TITLE}, at most {limits.max_kl:g}"
        notes = [
            f"usable: attack success at most {limits.max_asr:g}, benign answered at least {limits.min_benign:g} of the "
            f"undefended share, degenerate outputs at most {limits.max_degenerate:g} above it{kl}",
            "chosen by the requests these figures are of: report figures of others, with evaluate",
        ]
        if self.given_up:
            notes.append(
                f"{self.given_up} settings were not measured: on their lines {self.early_stop} smaller alphas in "
                "succession left no benign request answered"
            )
        if any(self.overlap.values()):
            shared = ", ".join(f"{count} by {kind.removesuffix('s')}" for kind, count in self.overlap.items())
            notes.append(f"requests that calibration saw: {shared}, which was allowed")
        chosen = self.choice.line
        wider = [
            (line, run)
            for line, run in self.choice.runs.items()
            if chosen is not None and not line.ablated and run.width > self.choice.runs[chosen].width
        ]
        for line, run in wider:
            notes.append(
                f"{line.title}: a wider run than the chosen one (x {run.width:.2f}); lines that do not ablate are "
                "what the others are compared with, and are candidates under --candidates all"
            )
        return notes

    def markdown(self) -> str:
        """The page: verdict, picture, runs, and attack success / refused / benign answered by alpha and line."""
        line, point = self.choice.line, self.chosen
        if line is None or point is None:
            head = self.nothing_usable()
        else:
            figures = [["figure", "chosen", "undefended"], *map(list, self._figure_rows(point))]
            head = f"Chosen: **{line.title}, alpha {point.alpha:g}**.\n\n{markdown_table(figures)}"
        runs = markdown_table([["line", "usable alphas", "last / first", "middle"], *self._run_rows()])
        return "\n\n".join([head, runs, self.alpha_table(), "\n".join(f"- {note}" for note in self.notes())])

    def alpha_table(self) -> str:
        """Markdown: attack success / refused / benign answered, a column per line, usable ones in bold."""
        lines = self.grid.lines
        points = {(point.line, point.alpha): point for point in self.points}
        usable = {
            (line, judged.alpha) for line, found in self.judged.items() for judged in found if judged.usable
        }
        step = -(-len(self.grid.alphas) // TABLE_ROWS) if len(self.grid.alphas) > TABLE_ROWS else 1
        shown = [
            alpha
            for number, alpha in enumerate(self.grid.alphas)
            if number % step == 0 or alpha == self.choice.alpha
        ]
        rows = [["alpha", *(line.title for line in lines)]]
        for alpha in shown:
            cells = [_cell(points.get((line, alpha))) for line in lines]
            marked = [
                f"**{cell}**" if (line, alpha) in usable else cell
                for line, cell in zip(lines, cells, strict=True)
            ]
            rows.append([f"{alpha:g}", *marked])
        heading = "Attack success / refused / benign answered"
        every = "" if step == 1 else f", of one alpha in {step} and the chosen one"
        return f"{heading}{every}; usable settings in bold.\n\n{markdown_table(rows)}"

    def with_plan(self, digest: str | None) -> Sweep:
        """The same with the sha256 of the plan that was written."""
        return replace(self, plan=digest)

    def _figure_rows(self, point: Point) -> list[tuple[str, str, str]]:
        rows = [
            (
                f"{'harmful' if figure.requests == HARMFUL else 'benign'}: {figure.title}",
                _share(point.figures[figure.name]),
                _share(self.undefended[figure.name]),
            )
            for figure in FIGURES
        ]
        kl = point.figures[KL]
        return [*rows, (KL_TITLE, f"{kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}]", "0")]

    def _run_rows(self) -> list[list[str]]:
        rows = []
        for line in self.grid.lines:
            run = self.choice.runs.get(line)
            if run is None:
                rows.append([line.title, "none", NOT_MEASURED, NOT_MEASURED])
            else:
                ends = f"{run.alphas[0]:g} to {run.alphas[-1]:g}"
                rows.append([line.title, ends, f"{run.width:.2f}", f"{run.middle:g}"])
        return rows


def judged_lines(
    points: Sequence[Point], limits: Limits, undefended: Mapping[str, Reading]
) -> dict[Line, list[Judged]]:
    """The points by line, in order, and the limits that each breaks."""
    base = {name: reading.value for name, reading in undefended.items()}
    found: dict[Line, list[Judged]] = {}
    for point in points:
        found.setdefault(point.line, []).append(Judged(point.alpha, limits.violations(point.values, base)))
    return found


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its heading."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _figures_json(figures: Figures) -> dict[str, Any]:
    return {name: asdict(reading) for name, reading in figures.items()}


def _cell(point: Point | None) -> str:
    if point is None:
        return NOT_MEASURED
    values = point.values
    return " / ".join(f"{values[name]:.2f}" for name in ("attack_success", "refused", "benign_answered"))


def _share(reading: Reading) -> str:
    return f"{reading.value:.2f} [{reading.low:.2f}, {reading.high:.2f}]"
