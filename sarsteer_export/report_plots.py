"""The plots of the parity page as inline SVG that takes its colours from the page, light or dark.

matplotlib draws with stand-in colours; each is then replaced by a CSS value. Text stays text.
"""

from __future__ import annotations

import html
import io
import math
import re
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from engines.trace import LOGITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

SIZE_INCHES = (4.5, 2.9)
"""Small, so that text of 10 points stays readable where a phone shows the plot at its own width."""
TEXT, GRID, LIMIT = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707")
CSS_COLOURS = {
    TEXT: "currentColor",
    GRID: "var(--rule)",
    LIMIT: "var(--fail)",
    **{stand_in: f"var(--series-{number})" for number, stand_in in enumerate(SERIES, start=1)},
}
MARKERS = ("o", "s", "^", "D")
RC: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "sarsteer-export",
    "text.parse_math": False,
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COSINE_ROUNDING = 1e-16
"""Where a cosine of exactly 1 is drawn on a log axis: the rounding of float64."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Plot:
    """A plot with its heading and caption. `svg` is None when there is nothing to draw; `caption` says why."""

    title: str
    caption: str
    svg: str | None = None


def effect_cosine_plot(
    cases: Sequence[Mapping[str, Any]], layers: Sequence[int], limits: Mapping[str, Any]
) -> Plot:
    """1 − cosine of the effect at every block's output, the worst over steps and rows, a line per script.

    `cases`: those of the report. `layers`: the blocks in order, which is that of the tensors in `effects`;
    counted from 0 when they are not as many as the tensors. Effects below the floor of `limits` are rounding
    and left out.
    """
    floor, limit = float(limits["effect_floor"]), 1 - float(limits["effect_cosine"])
    title = "Effect of the edit by block: distance from the oracle"
    tensors = dict.fromkeys(
        effect["tensor"] for case in cases for effect in case["effects"] if effect["tensor"] != LOGITS
    )
    if not tensors:
        return Plot(title, "No effect was measured at block outputs.")
    numbers = list(layers) if len(layers) == len(tensors) else list(range(len(tensors)))
    block_of = dict(zip(tensors, numbers, strict=True))
    series: dict[str, Points] = {}
    undrawn = 0
    for case in cases:
        worst: dict[int, float] = {}
        for effect in case["effects"]:
            if effect["tensor"] not in block_of or not float(effect["relative_norm"]) >= floor:
                continue
            distance = 1 - float(effect["cosine"])
            if not math.isfinite(distance):
                undrawn += 1
                continue
            block = block_of[effect["tensor"]]
            worst[block] = max(worst.get(block, COSINE_ROUNDING), distance)
        series[case["case"]] = sorted(worst.items())
    silent = [block for block in numbers if not any(block in dict(line) for line in series.values())]
    caption = (
        "Worst over steps and rows. Below the line the engine's effect points where the oracle's does. "
        f"A cosine of exactly 1 is drawn at {COSINE_ROUNDING:g}."
        + (f" No effect above the floor of {floor:g}, not judged: {_blocks(silent)}." if silent else "")
        + (f" Not finite, not drawn: {undrawn} effects." if undrawn else "")
    )
    if not any(series.values()):
        return Plot(title, caption)
    axes = _axes("decoder block (0-based)", "1 − cosine (no unit)", logarithmic=True)
    _draw_lines(axes, series)
    if limit > 0:
        axes.axhline(limit, color=LIMIT, linestyle="--", label=f"limit {limit:.1g}")
    _whole_decades(axes)
    _legend(axes)
    return Plot(title, caption, _svg(axes, "effect", title, _described(series, "block")))


def edit_size_plot(blocks: Sequence[Mapping[str, Any]]) -> Plot:
    """‖αv⊥‖ / ‖h‖ by block: the size of what is added against that of the stream it is added to."""
    title = "Size of the edit by block"
    ratios = [
        (int(block["layer"]), float(block["edit_norm"]) / float(block["hidden_norm"]))
        for block in blocks
        if block.get("hidden_norm") and block.get("edit_norm") is not None
    ]
    ratios = [(layer, ratio) for layer, ratio in ratios if math.isfinite(ratio)]
    if not ratios:
        return Plot(title, "The norms of the stream were not measured.")
    if not any(ratio for _, ratio in ratios):
        return Plot(title, "No edit adds anything: every ‖αv⊥‖ is 0.")
    drawn = {layer for layer, _ in ratios}
    missing = [int(block["layer"]) for block in blocks if int(block["layer"]) not in drawn]
    caption = (
        "Norm of what is added, against the mean norm of the unsteered stream at the last prompt position. "
        "Projections add no fixed vector and do not count."
        + (f" Norm not measured: {_blocks(missing)}." if missing else "")
    )
    axes = _axes("decoder block (0-based)", "‖αv⊥‖ / ‖h‖ (no unit)", logarithmic=False)
    axes.bar([layer for layer, _ in ratios], [ratio for _, ratio in ratios], width=0.6, color=SERIES[0])
    axes.set_ylim(bottom=0)
    return Plot(title, caption, _svg(axes, "size", title, _described({"edit": ratios}, "block")))


def logits_difference_plot(cases: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> Plot:
    """Largest difference of the edited logits from the oracle's by step, a line per script."""
    title = "Logits by step: distance from the oracle"
    found = {
        case["case"]: [(step, float(value)) for step, value in enumerate(case["logits_difference"])]
        for case in cases
    }
    points = [value for line in found.values() for _, value in line]
    if not points:
        return Plot(title, "No logits were compared.")
    drawn = [value for value in points if math.isfinite(value) and value > 0]
    if not drawn:
        zeros = sum(value == 0 for value in points)
        return Plot(
            title, f"Nothing to draw: of {len(points)} differences {zeros} are 0, the rest not finite."
        )
    floor = min(drawn) / 10
    series = {
        name: [(step, max(value, floor)) for step, value in line if math.isfinite(value)]
        for name, line in found.items()
    }
    undrawn = sum(not math.isfinite(value) for value in points)
    caption = (
        "Step 0 is the prefill. Largest absolute difference of the steered logits, over rows and tokens."
        f" The limit ({limits['max_abs']:g}) is relative to the largest logit of each step, so it is no line here."
        + (" A difference of 0 is drawn at the lower edge." if 0 in points else "")
        + (f" Not finite, not drawn: {undrawn}." if undrawn else "")
    )
    axes = _axes("step (0 = prefill, then decode)", "max |engine − oracle| (logits)", logarithmic=True)
    _draw_lines(axes, series)
    _whole_decades(axes)
    _legend(axes)
    return Plot(title, caption, _svg(axes, "logits", title, _described(series, "step")))


def _axes(x_label: str, y_label: str, *, logarithmic: bool) -> Axes:
    with mpl.rc_context(RC):
        axes = Figure(figsize=SIZE_INCHES, layout="constrained").add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    return axes


def _draw_lines(axes: Axes, series: Mapping[str, Points]) -> None:
    """A line per name. They often coincide, so the first is wide and its markers large."""
    for number, (name, line) in enumerate(series.items()):
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            color=SERIES[number % len(SERIES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=max(4, 8 - 3 * number),
            linewidth=max(1, 2.5 - number),
            label=name,
        )


def _whole_decades(axes: Axes) -> None:
    """Widen a log axis to powers of ten, so that at least two of them are labelled."""
    low, high = (math.log10(bound) for bound in axes.get_ylim())
    axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))


def _legend(axes: Axes) -> None:
    with mpl.rc_context(RC):
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)


def _svg(axes: Axes, name: str, title: str, description: str) -> str:
    return svg_of(cast("Figure", axes.figure), name, title, description)


def svg_of(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element whose ids begin with `name`, so that several fit one page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in CSS_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    if view_box is None:
        raise RuntimeError("matplotlib wrote an SVG without viewBox")
    labels = (
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box.group()} role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc">{labels}'
    )
    return start + svg[svg.index(">") + 1 :].strip()


def _described(series: Mapping[str, Points], axis: str) -> str:
    """What a reader who does not see the plot needs: extremes and middle of every line."""
    sentences = []
    for name, line in series.items():
        if line:
            (x_low, low), (x_high, high) = (choose(line, key=lambda point: point[1]) for choose in (min, max))
            middle = median(value for _, value in line)
            sentences.append(
                f"{name}: {len(line)} points, lowest {low:.2g} at {axis} {x_low}, "
                f"highest {high:.2g} at {axis} {x_high}, median {middle:.2g}."
            )
    return " ".join(sentences)


def _blocks(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def power_of_ten(value: float, _position: object = None) -> str:
    """A tick of a log axis: 10 with its exponent, other values as they are."""
    exponent = math.log10(value)
    return (
        f"10{str(round(exponent)).translate(SUPERSCRIPTS)}" if exponent == round(exponent) else f"{value:g}"
    )
