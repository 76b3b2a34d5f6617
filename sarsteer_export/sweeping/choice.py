"""The rule that chooses: the middle of the widest run of usable alphas, on the line whose run is widest.

A single usable alpha may be luck. A run of them says that the choice stands where neither a little more nor a little
less steering matters; its width is its last alpha over its first, since steering acts by multiples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sarsteer_export.sweeping.grid import Line
    from sarsteer_export.sweeping.limits import Violation

DIGITS = 9
"""Widths are compared to so many digits: 0.2/0.1 and 0.4/0.2 are equally wide."""


class Candidates(str, Enum):
    """The lines that may be chosen.

    `ABLATED`: those that ablate, which is the method; others are what they are compared with, and chosen only when
    no ablated line has a usable alpha. `ALL`: every line.
    """

    ABLATED = "ablated"
    ALL = "all"


@dataclass(frozen=True)
class Judged:
    """One measured alpha of a line, and the limits that it breaks."""

    alpha: float
    violations: tuple[Violation, ...]

    @property
    def usable(self) -> bool:
        """Whether every limit is kept."""
        return not self.violations


@dataclass(frozen=True)
class Run:
    """Adjacent usable alphas of one line, ascending."""

    alphas: tuple[float, ...]

    @property
    def width(self) -> float:
        """The last alpha over the first; 1 for a single one."""
        return round(self.alphas[-1] / self.alphas[0], DIGITS)

    @property
    def middle(self) -> float:
        """The alpha nearest, as a ratio, to the geometric mean of both ends; the smaller of two equally near."""
        centre = math.log(self.alphas[0] * self.alphas[-1]) / 2
        return min(self.alphas, key=lambda alpha: round(abs(math.log(alpha) - centre), DIGITS))


@dataclass(frozen=True)
class Choice:
    """What a sweep decides: the widest run of every line that has one, and the chosen line if there is any."""

    runs: dict[Line, Run]
    line: Line | None

    @property
    def alpha(self) -> float | None:
        """The chosen strength."""
        return None if self.line is None else self.runs[self.line].middle


def choose(judged: Mapping[Line, Sequence[Judged]], candidates: Candidates = Candidates.ABLATED) -> Choice:
    """Choose from the measured alphas of every line, ascending.

    Of equally wide runs: the smaller rank, then fewer blocks, the smaller lambda, the line that came first.
    """
    runs = {line: run for line, points in judged.items() if (run := widest_run(points)) is not None}
    allowed = [line for line in runs if line.ablated or candidates is Candidates.ALL] or list(runs)
    line = min(allowed, key=lambda line: (-runs[line].width, *_modesty(line)), default=None)
    return Choice(runs, line)


def widest_run(points: Sequence[Judged]) -> Run | None:
    """The widest run of adjacent usable alphas, the first of equals; None when no alpha is usable."""
    runs: list[list[float]] = [[]]
    for point in points:
        if point.usable:
            runs[-1].append(point.alpha)
        else:
            runs.append([])
    found = [Run(tuple(alphas)) for alphas in runs if alphas]
    return max(found, key=lambda run: run.width, default=None)


def nearest(judged: Mapping[Line, Sequence[Judged]]) -> tuple[Line, Judged]:
    """The measured setting that breaks its limits least, by the sum of what it is over; the first of equals."""
    pairs = [(line, point) for line, points in judged.items() for point in points]
    return min(pairs, key=lambda pair: _over(pair[1]))


def _over(point: Judged) -> float:
    over = sum(violation.excess for violation in point.violations)
    return math.inf if math.isnan(over) else over


def _modesty(line: Line) -> tuple[float, ...]:
    return (line.rank, math.inf if line.layers is None else len(line.layers), line.ablation)
