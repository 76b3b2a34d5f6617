"""The overhead benchmark's result for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node_time import PHASES, Spread
from random_decoder import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping


def table(result: Mapping[str, Any]) -> str:
    """The result for people, as Markdown."""
    hardware, settings, decoder = result["hardware"], result["settings"], result["decoder"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    nodes, memory = result["steering_nodes"], result["peak_rss_bytes"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores ({settings['threads']} threads), {hardware['system']}; "
        f"{versions}",
        f"decoder: {decoder['parameters'] / 1e6:.0f} M parameters in {settings['blocks']} blocks of width "
        f"{settings['width']}, {decoder['dtype']}; {decoder['edits']} edits; batch 1",
        "",
        f"| | prefill of {settings['positions']} | decode behind {settings['positions']} |",
        "| --- | --- | --- |",
    ]

    def row(name: str, cell: Any) -> None:
        lines.append("| " + " | ".join([name, *(cell(phase) for phase in PHASES)]) + " |")

    def spread(part: str, key: str, digits: int, scale: float = 1) -> Any:
        def cell(phase: str) -> str:
            values = result[part][phase][key].values()
            return Spread(*(scale * value for value in values)).text(digits)

        return cell

    row("rounds", lambda phase: str(Settings(**settings).pairs_of(phase)))
    row("unsteered, ms", spread("latency", "unsteered_ms", 1))
    row("steered, ms", spread("latency", "steered_ms", 1))
    row("**steered / unsteered**", spread("latency", "ratio", 4))
    row("unsteered again / unsteered", spread("latency", "noise_ratio", 4))
    row("**node time in steering nodes, %**", spread("node_time", "share", 3, 100))
    row("the same, absorbing nodes counted whole, %", spread("node_time", "share_at_most", 3, 100))
    row("node time in steering nodes, ms", spread("node_time", "steering_us", 3, 1e-3))
    lines += [
        "",
        "Medians and [quartiles] over rounds.",
        f"Steering nodes inserted: {nodes['inserted']}; left by the optimiser: {nodes['left']}; nodes that "
        f"absorbed one: {nodes['absorbed_by']}.",
        "Peak resident memory: "
        + ", ".join(
            f"{side} {'unknown' if size is None else f'{size / 2**20:.0f} MiB'}"
            for side, size in memory.items()
        )
        + ".",
    ]
    return "\n".join(lines)
