"""The plots of an evaluation as one SVG file: rates with their intervals, and damage against attack success."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from sarsteer_export.evaluation.figures import KL, KL_TITLE
from sarsteer_export.report_plots import MARKERS, RC, SERIES, svg_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from sarsteer_export.evaluation.intervals import Estimate
    from sarsteer_export.evaluation.report import Row

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 9.0, 0.5, 1.6
DRAWN = (("attack_success", "harmful: attack success"), ("benign_answered", "benign: answered"))
SPREAD = 0.55
"""How far apart the outermost figures of one system stand, in lines."""
STYLE = """
svg{color:#1f2328;--rule:#d0d7de;--fail:#cf222e;--series-1:#0969da;--series-2:#bc4c00;--series-3:#1a7f37;--series-4:#8250df}
@media (prefers-color-scheme: dark) {
svg{color:#e6edf3;--rule:#3d444d;--fail:#ff7b72;--series-1:#4493f8;--series-2:#f0883e;--series-3:#3fb950;--series-4:#ab7df8}
}
"""
"""The colours of a file that stands alone, by the names that `report_plots` gives them."""


def picture_title(rows: Sequence[Row]) -> str:
    """What the picture shows; no damage where none was measured."""
    return f"attack success{', benign answers and damage' if _any_damage(rows) else ' and benign answers'} by system"


def evaluation_svg(rows: Sequence[Row]) -> str:
    """Rates and, where it was measured, damage as an SVG file of its own, which follows the reader's colour scheme."""
    systems = list(dict.fromkeys(row.system for row in rows))
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    height = HEAD_INCHES + ROW_INCHES * max(4, len(systems))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        rates, *damage = (
            figure.subplots(1, 2, width_ratios=(3, 2)) if _any_damage(rows) else [figure.subplots()]
        )
        _draw_rates(rates, rows, systems, runtimes)
        for axes in damage:
            _draw_damage(axes, rows, systems, runtimes)
        handles, labels = rates.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    title = picture_title(rows)
    svg = svg_of(figure, "evaluation", title[0].upper() + title[1:], " ".join(map(_described, rows)))
    end = svg.index(">") + 1
    return f"{svg[:end]}<style>{STYLE}</style>{svg[end:]}\n"


def _draw_rates(axes: Axes, rows: Sequence[Row], systems: Sequence[str], runtimes: Sequence[str]) -> None:
    """A line per system; figures and runtimes stand beside one another in it, for they often coincide."""
    lines = len(DRAWN) * len(runtimes)
    for number, (name, label) in enumerate(DRAWN):
        for order, runtime in enumerate(runtimes):
            drawn = [row for row in rows if row.runtime == runtime]
            place = SPREAD * ((number * len(runtimes) + order) / (lines - 1) - 0.5)
            axes.errorbar(
                [row.figures[name].value for row in drawn],
                [systems.index(row.system) + place for row in drawn],
                xerr=_arms([row.figures[name] for row in drawn]),
                linestyle="none",
                marker=MARKERS[order % len(MARKERS)],
                markersize=5,
                color=SERIES[number],
                capsize=3,
                label=f"{label} ({runtime})",
            )
    axes.set_yticks(range(len(systems)), [f"{name}  {number}" for number, name in enumerate(systems, 1)])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of requests, with intervals")
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_damage(axes: Axes, rows: Sequence[Row], systems: Sequence[str], runtimes: Sequence[str]) -> None:
    """Damage against attack success; systems are named by their numbers."""
    for order, runtime in enumerate(runtimes):
        drawn = [row for row in rows if row.runtime == runtime and _has_damage(row)]
        axes.errorbar(
            [row.figures[KL].value for row in drawn],
            [row.figures["attack_success"].value for row in drawn],
            xerr=_arms([row.figures[KL] for row in drawn]),
            yerr=_arms([row.figures["attack_success"] for row in drawn]),
            linestyle="none",
            marker=MARKERS[order % len(MARKERS)],
            markersize=8 - 3 * order,  # they often coincide
            color=SERIES[2 + order % 2],
            capsize=3,
        )
        for row in drawn if not order else ():
            axes.annotate(
                str(1 + systems.index(row.system)),
                (row.figures[KL].value, row.figures["attack_success"].value),
                xytext=(5, 5),
                textcoords="offset points",
            )
    axes.set_xlabel(f"benign: {KL_TITLE}")
    axes.set_ylabel("attack success")
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)


def _any_damage(rows: Sequence[Row]) -> bool:
    return any(KL in row.figures for row in rows)


def _has_damage(row: Row) -> bool:
    """Whether damage was measured and can be drawn: a divergence may be infinite."""
    return KL in row.figures and math.isfinite(row.figures[KL].value + row.figures[KL].interval.high)


def _arms(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far each interval reaches below and above its value; an interval need not hold it."""
    return [
        [max(0.0, estimate.value - estimate.interval.low) for estimate in estimates],
        [max(0.0, estimate.interval.high - estimate.value) for estimate in estimates],
    ]


def _described(row: Row) -> str:
    figures = [f"{label} {row.figures[name].value:.2f}" for name, label in DRAWN]
    if KL in row.figures:
        figures.append(f"{KL_TITLE} {row.figures[KL].value:.2g}")
    return f"{row.system}, {row.runtime}: {', '.join(figures)}."
