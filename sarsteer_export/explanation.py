"""`patch --explain`: the form of every edit, why it has that form, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from graph_passes.forms import cost
from graph_passes.lowering import StreamType
from graph_passes.names import edit_of, is_steering
from graph_passes.scopes import decoder_scopes
from graph_passes.selection import STRENGTH_INPUT

if TYPE_CHECKING:
    from graph_passes.patch import PatchResult

PREFILL = 512
"""Positions of the prefill that costs are shown for; decode has one."""


def explain_edits(result: PatchResult) -> list[dict[str, Any]]:
    """Per edit made: where it stands, its form, why, and FLOPs and bytes of a decode step and of a prefill.

    Bytes are what nodes read and write when each runs by itself; a runtime that fuses them moves fewer.
    """
    entries = []
    baked = all(value.name != STRENGTH_INPUT for value in result.model.graph.input)
    for edit in result.edits:
        elem_bytes = StreamType(result.stream.elem_type_of(edit.anchor)).numpy_dtype.itemsize
        costs = {
            phase: dataclasses.asdict(
                cost(
                    result.plan.edits[edit.number],
                    edit.form,
                    hidden_size=result.stream.hidden_size,
                    elem_bytes=elem_bytes,
                    sequence=sequence,
                    baked=baked,
                )
            )
            for phase, sequence in (("decode", 1), (f"prefill of {PREFILL}", PREFILL))
        }
        named = {"site": edit.site.value, "form": edit.form.value}
        entries.append(dataclasses.asdict(edit) | named | {"cost": costs})
    return entries


def edits_text(entries: list[dict[str, Any]]) -> str:
    """A line per edit: where it stands."""
    return "\n".join(f"{_heading(entry)} at {entry['anchor']}" for entry in entries)


def _heading(entry: dict[str, Any]) -> str:
    scope = f"  {entry['scope']}" if entry["scope"] else ""
    return f"block {entry['layer']:3}  {entry['site']:18} {entry['op']:8} {entry['positions']:9}{scope}"


def explanation_text(entries: list[dict[str, Any]], shared: int) -> str:
    """A line per edit, one of the sum, and one of the `shared` nodes."""
    lines = [
        f"{_heading(entry)} {entry['form']}: {entry['why']}; {_costs(entry['cost'])}" for entry in entries
    ]
    total = {
        phase: {key: sum(entry["cost"][phase][key] for entry in entries) for key in ("flops", "bytes")}
        for phase in (entries[0]["cost"] if entries else ())
    }
    lines.append(f"all edits, batch 1: {_costs(total)}")
    if shared:
        lines.append(
            f"shared, once per graph: {shared} nodes on a few numbers per position, rows or strengths"
        )
    return "\n".join(lines)


def shared_nodes(result: PatchResult) -> int:
    """How many nodes mark positions, find rows or read strengths for all edits."""
    model = result.model
    nodes = [node for scope in decoder_scopes(model) for node in scope.graph(model).node]
    return sum(is_steering(node) and edit_of(node.name) is None for node in nodes)


def _costs(costs: dict[str, dict[str, int]]) -> str:
    return ", ".join(
        f"{phase} {_short(found['flops'])}FLOP {_short(found['bytes'])}B" for phase, found in costs.items()
    )


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "
