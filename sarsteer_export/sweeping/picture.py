"""The picture of a sweep as one SVG file: attack success against damage, and rates against alpha line by line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from sarsteer_export.evaluation.figures import KL, KL_TITLE
from sarsteer_export.report_plots import GRID, LIMIT, MARKERS, RC, TEXT, power_of_ten, svg_of
from sarsteer_export.sweeping.pareto import ATTACK_SUCCESS, BENIGN_ANSWERED, pareto_front

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from sarsteer_export.sweeping.grid import Line
    from sarsteer_export.sweeping.points import Point
    from sarsteer_export.sweeping.report import Sweep

WIDTH_INCHES, FRONT_INCHES, PANEL_INCHES, LEGEND_INCHES = 9.0, 3.6, 2.3, 0.35
PANELS_A_ROW = 4
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}
RINGED: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgecolor": TEXT,
    "markeredgewidth": 0.9,
}
"""The points of the Pareto front."""
COLOURS = tuple(f"#1{number}0101" for number in range(8))
"""Stand-ins for `--line-1` and so on; lines beyond them have the same colours with other markers."""
USABLE = "#200101"
CHOSEN: dict[str, Any] = {"linestyle": "none", "marker": "*", "color": USABLE, "markeredgecolor": TEXT}
RATES = (
    (ATTACK_SUCCESS, "harmful: attack success"),
    ("refused", "harmful: refused"),
    (BENIGN_ANSWERED, "benign: answered"),
)
RATE_COLOURS = ("#300101", "#310101", "#320101")
LIGHT = {
    "line-1": "#0969da",
    "line-2": "#bc4c00",
    "line-3": "#1a7f37",
    "line-4": "#8250df",
    "line-5": "#bf3989",
    "line-6": "#0a7f86",
    "line-7": "#7d5b00",
    "line-8": "#57606a",
    "usable": "#2da44e",
    "rate-1": "#cf222e",
    "rate-2": "#9a6700",
    "rate-3": "#0969da",
}
DARK = {
    "line-1": "#4493f8",
    "line-2": "#f0883e",
    "line-3": "#3fb950",
    "line-4": "#ab7df8",
    "line-5": "#f778ba",
    "line-6": "#39c5cf",
    "line-7": "#d4a72c",
    "line-8": "#9198a1",
    "usable": "#3fb950",
    "rate-1": "#ff7b72",
    "rate-2": "#d29922",
    "rate-3": "#4493f8",
}
STAND_INS = {
    **{stand_in: f"line-{number}" for number, stand_in in enumerate(COLOURS, start=1)},
    USABLE: "usable",
    **{stand_in: f"rate-{number}" for number, stand_in in enumerate(RATE_COLOURS, start=1)},
}


def sweep_svg(found: Sweep) -> str:
    """Both pictures as an SVG file of its own, which follows the reader's light or dark scheme."""
    lines = found.grid.lines
    rows = math.ceil(len(lines) / PANELS_A_ROW)
    legend = LEGEND_INCHES * math.ceil((len(lines) + 2) / PANELS_A_ROW)
    heights = [FRONT_INCHES + legend, *[PANEL_INCHES] * rows]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + LEGEND_INCHES), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(heights[0], sum(heights[1:]) + LEGEND_INCHES))
        fronts, panels = parts
        by_kl, by_answers = fronts.subplots(1, 2, sharey=True)
        _draw_front(by_kl, found, KL)
        _draw_front(by_answers, found, BENIGN_ANSWERED)
        by_kl.set_ylabel("attack success")
        by_kl.set_xlabel(f"{KL_TITLE}, on benign answers")
        by_answers.set_xlabel("benign requests answered, falling")
        fronts.legend(
            handles=_front_handles(found),
            loc="outside upper center",
            ncols=PANELS_A_ROW,
            frameon=False,
            fontsize=9,
        )
        grid = panels.subplots(rows, min(PANELS_A_ROW, len(lines)), sharey=True, squeeze=False)
        cells = grid.ravel()
        for axes, line in zip(cells, lines, strict=False):
            _draw_rates(axes, found, line)
        for axes in cells[len(lines) :]:
            axes.set_visible(False)
        handles = [
            *(
                Line2D([], [], color=colour, label=label)
                for colour, (_, label) in zip(RATE_COLOURS, RATES, strict=True)
            ),
            Line2D([], [], color=USABLE, linewidth=8, alpha=0.25, label="widest usable run"),
        ]
        panels.legend(handles=handles, loc="outside lower center", ncols=4, **LEGEND)
    svg = svg_of(figure, "sweep", "Attack success against damage, and rates against alpha", _described(found))
    for stand_in, name in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    end = svg.index(">") + 1
    return f"{svg[:end]}<style>{_style()}</style>{svg[end:]}\n"


def _draw_front(axes: Axes, found: Sweep, figure: str) -> None:
    """All points by one figure of damage; those of a line are joined in the order of alpha."""
    for number, line in enumerate(found.grid.lines):
        drawn = [
            point
            for point in found.points
            if point.line == line and math.isfinite(point.figures[figure].value)
        ]
        axes.plot(
            _values(drawn, figure),
            _values(drawn, ATTACK_SUCCESS),
            color=COLOURS[number % len(COLOURS)],
            marker=_marker(number),
            markersize=4,
            linewidth=0.8,
        )
    front = pareto_front(found.points, figure)
    axes.plot(
        _values(front, figure),
        _values(front, ATTACK_SUCCESS),
        **RINGED,
    )
    if (chosen := found.chosen) is not None:
        axes.plot(
            [chosen.figures[figure].value],
            [chosen.figures[ATTACK_SUCCESS].value],
            markersize=17,
            zorder=5,
            **CHOSEN,
        )
    axes.axhline(found.limits.max_asr, color=LIMIT, linestyle="--", linewidth=1)
    if (limit := _damage_limit(found, figure)) is not None:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    axes.set_ylim(-0.06, 1.06)
    if figure == KL:
        _kl_scale(axes, found.points)
    else:
        axes.set_xlim(1.06, -0.06)
    axes.grid(linewidth=0.5)
    axes.set_axisbelow(True)


def _kl_scale(axes: Axes, points: Sequence[Point]) -> None:
    """Logarithmic: damage grows over several decades."""
    values = [value for value in _values(points, KL) if math.isfinite(value) and value > 0]
    if values:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
        axes.xaxis.set_major_formatter(FuncFormatter(power_of_ten))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _damage_limit(found: Sweep, figure: str) -> float | None:
    if figure == KL:
        return found.limits.max_kl
    return found.limits.min_benign * found.undefended[BENIGN_ANSWERED].value


def _draw_rates(axes: Axes, found: Sweep, line: Line) -> None:
    """Rates against alpha; the widest usable run is shaded, its middle dashed, the chosen line's title bold."""
    points = [point for point in found.points if point.line == line]
    alphas = [point.alpha for point in points]
    run = found.choice.runs.get(line)
    if run is not None:
        axes.axvspan(*_half_a_step(found, run.alphas), color=USABLE, alpha=0.25, linewidth=0)
        axes.axvline(run.middle, color=USABLE, linestyle="--", linewidth=1.2)
    for colour, (name, _) in zip(RATE_COLOURS, RATES, strict=True):
        axes.plot(
            alphas, _values(points, name), color=colour, linewidth=1.4, marker="." if len(points) < 8 else ""
        )
    axes.set_xscale("log")
    axes.set_xlim(found.grid.alphas[0] / 1.05, found.grid.alphas[-1] * 1.05)
    ticks = _ticks(found.grid.alphas)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-0.04, 1.04)
    chosen = line == found.choice.line
    axes.set_title(line.title, fontsize=10, fontweight="bold" if chosen else "normal")
    axes.set_xlabel("alpha")
    axes.grid(axis="y", linewidth=0.5, color=GRID)


def _half_a_step(found: Sweep, alphas: Sequence[float]) -> tuple[float, float]:
    """The run's ends, each wider by half a step of the grid, so that a single usable alpha can be seen."""
    grid = found.grid.alphas
    first, last = grid.index(alphas[0]), grid.index(alphas[-1])
    below = math.sqrt(grid[max(first - 1, 0)] * alphas[0]) if first else alphas[0] / 1.05
    above = math.sqrt(grid[last + 1] * alphas[-1]) if last + 1 < len(grid) else alphas[-1] * 1.05
    return below, above


def _ticks(alphas: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every decade within the grid, or its ends where it holds none; never more than six."""
    low, high = alphas[0], alphas[-1]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{decade}") for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if 2 <= len(found) <= 6:
            return found
    return sorted({low, high})


def _front_handles(found: Sweep) -> list[Line2D]:
    lines = [
        Line2D(
            [],
            [],
            color=COLOURS[number % len(COLOURS)],
            marker=_marker(number),
            markersize=4,
            label=line.title,
        )
        for number, line in enumerate(found.grid.lines)
    ]
    front = Line2D([], [], label="Pareto front", **RINGED)
    limit = Line2D([], [], color=LIMIT, linestyle="--", linewidth=1, label="limit")
    star = Line2D([], [], markersize=13, label=_chosen_text(found), **CHOSEN)
    return [*lines, front, limit, *([star] if found.chosen is not None else [])]


def _chosen_text(found: Sweep) -> str:
    return (
        ""
        if found.choice.line is None
        else f"chosen: {found.choice.line.title}, alpha {found.choice.alpha:g}"
    )


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _values(points: Sequence[Point], name: str) -> list[float]:
    return [point.figures[name].value for point in points]


def _described(found: Sweep) -> str:
    """What a reader who does not see the picture needs: the usable run of every line, and the choice."""
    sentences = []
    for line in found.grid.lines:
        run = found.choice.runs.get(line)
        usable = (
            "no usable alpha" if run is None else f"usable from alpha {run.alphas[0]:g} to {run.alphas[-1]:g}"
        )
        sentences.append(f"{line.title}: {usable}.")
    return " ".join([*sentences, f"{_chosen_text(found) or 'Nothing is usable'}."])


def _style() -> str:
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK)
    )
    return (
        f"\nsvg{{color:#1f2328;--rule:#d0d7de;--fail:#cf222e;{light}}}\n"
        f"@media (prefers-color-scheme: dark) {{\nsvg{{color:#e6edf3;--rule:#3d444d;--fail:#ff7b72;{dark}}}\n}}\n"
    )
