"""What is in a safetensors file of ours: a plan, or the statistics that `sweep` leaves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from calibration.statistics import FORMAT, METADATA_KEY, StateStatistics
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.inspection.plan import inspect_plan

if TYPE_CHECKING:
    from pathlib import Path


def inspect_safetensors(path: Path) -> Inspection:
    """Statistics, where the file says that it holds some; else it has to be a plan."""
    return inspect_statistics(path) if _format(path) == FORMAT else inspect_plan(path)


def inspect_statistics(path: Path) -> Inspection:
    """Counts, sizes and provenance of calibration statistics."""
    statistics, provenance = StateStatistics.load(path)
    content = {
        "kind": "statistics",
        "pairs": statistics.pairs,
        "benign": statistics.benign,
        "num_layers": statistics.layers,
        "hidden_size": statistics.width,
        "provenance": provenance,
    }
    lines = [
        f"calibration statistics of {statistics.layers} blocks of width {statistics.width}, which `sweep` reads",
        f"  {statistics.pairs} harmful requests, each without and with the refusal text",
        f"  {statistics.benign} benign requests",
        *(f"  {name}: {value}" for name, value in provenance.items()),
    ]
    return Inspection(content, "\n".join(lines))


def _format(path: Path) -> object:
    """What a file says of itself; None where it says nothing, or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as opened:
            header = json.loads((opened.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return header.get("format") if isinstance(header, dict) else None
