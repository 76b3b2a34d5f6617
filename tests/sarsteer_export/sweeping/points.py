"""Points of a sweep with figures as given, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from sarsteer_export.sweeping.choice import Candidates, choose
from sarsteer_export.sweeping.grid import Grid, Line
from sarsteer_export.sweeping.limits import Limits
from sarsteer_export.sweeping.points import Point, Reading
from sarsteer_export.sweeping.report import Sweep, judged_lines

UNDEFENDED = {
    "attack_success": 1.0,
    "refused": 0.0,
    "harmful_degenerate": 0.0,
    "benign_answered": 1.0,
    "over_refused": 0.0,
    "benign_degenerate": 0.0,
    "kl": 0.0,
}


def reading(value: float) -> Reading:
    return Reading(value, value - 0.01, value + 0.01, "bootstrap")


def point(line: Line, alpha: float, **figures: float) -> Point:
    """A point that is like the undefended model but for the figures named."""
    values = UNDEFENDED | figures
    return Point(line, alpha, {name: reading(value) for name, value in values.items()})


def sweep_of(points: Sequence[Point], limits: Limits, candidates: Candidates = Candidates.ABLATED) -> Sweep:
    """The sweep of a full grid that found these points."""
    lines = tuple(dict.fromkeys(point.line for point in points))
    grid = Grid(
        tuple(point.alpha for point in points),
        tuple(dict.fromkeys(line.ablation for line in lines if line.rank)) or (0.0,),
        tuple(dict.fromkeys(line.rank for line in lines)),
    )
    undefended = {name: reading(value) for name, value in UNDEFENDED.items()}
    return Sweep(
        inputs={"judge": {"kind": "strings"}, "eval_harmful": {"count": 40}, "eval_benign": {"count": 40}},
        overlap={"clips": 0, "transcripts": 0},
        grid=grid,
        limits=limits,
        candidates=candidates,
        early_stop=3,
        undefended=undefended,
        points=tuple(points),
        choice=choose(judged_lines(points, limits, undefended), candidates),
    )
