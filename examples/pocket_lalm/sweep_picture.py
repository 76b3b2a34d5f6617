"""The picture of the sweep: attack success and benign answers against alpha, one panel a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from sweep_report import of_rank, usable_run

if TYPE_CHECKING:
    from pathlib import Path

    from sweep_report import SweepReport

# Mid tones on a transparent ground: legible on a white page and on a black one.
_INK = "#808080"
_HARM = "#d9534f"
_REFUSED = "#c98a1b"
_BENIGN = "#3a8fd9"
_USABLE = "#3fa34d"


def draw(report: SweepReport, path: Path) -> None:
    """Write the validation sweep as SVG; the usable alphas are shaded, the chosen one is a dashed line."""
    # A fixed salt makes equal sweeps equal files.
    with matplotlib.rc_context({"svg.hashsalt": "pocket", "font.size": 9, "text.color": _INK}):
        figure = Figure(figsize=(9.0, 2.9), layout="constrained")
        panels = figure.subplots(1, len(report.choice.alphas), sharey=True)
        for panel, (rank, alpha) in zip(panels, sorted(report.choice.alphas.items()), strict=True):
            sweep = of_rank(report.validation, rank)
            alphas = [point.alpha for point in sweep]
            run = usable_run(sweep)
            if run:
                # Half a step of the grid on either side, so that a single usable alpha can be seen.
                panel.axvspan(run[0] / 1.05, run[-1] * 1.05, color=_USABLE, alpha=0.25, linewidth=0)
                panel.axvline(alpha, color=_USABLE, linestyle="--", linewidth=1.2)
            panel.plot(alphas, [point.attack_success for point in sweep], color=_HARM)
            panel.plot(alphas, [point.harmful_refused for point in sweep], color=_REFUSED, linestyle=":")
            panel.plot(alphas, [point.benign_answered for point in sweep], color=_BENIGN)
            panel.set_xscale("log")
            panel.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], minor=False)
            panel.set_xticks([], minor=True)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_title(f"k = {rank}" if rank else "not ablated", color=_INK, fontsize=10)
            panel.set_xlabel("alpha", color=_INK)
            panel.tick_params(colors=_INK)
            panel.patch.set_alpha(0)
            for spine in panel.spines.values():
                spine.set_color(_INK)
        figure.legend(
            handles=panels[0].lines[-3:],
            labels=["harmful: attack success", "harmful: refused in full", "benign: answered"],
            loc="outside lower center",
            ncols=3,
            frameon=False,
        )
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
