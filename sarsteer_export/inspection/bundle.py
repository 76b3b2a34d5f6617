"""What is in a bundle."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sarsteer_export.bundle.manifest import PLAN, Manifest
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.inspection.plan import inspect_plan

if TYPE_CHECKING:
    from pathlib import Path


def inspect_bundle(folder: Path) -> Inspection:
    """Manifest, plan and parity of a bundle."""
    manifest = Manifest.read(folder)
    plan = inspect_plan(folder / PLAN)
    content = {"kind": "bundle", "manifest": dataclasses.asdict(manifest), "plan": plan.content}
    lines = [
        f"bundle of {manifest.model['class']} ({manifest.model['dtype']}), "
        f"fingerprint {manifest.model['fingerprint'][:12]}",
        f"parity: {manifest.parity['verdict']} on {manifest.parity['backend']}, {manifest.parity['precision']}",
    ]
    lines += [f"without {name}: {reason}" for name, reason in manifest.missing.items()]
    lines += [f"engine: {entry.label}, {entry.verdict}" for entry in manifest.engines]
    for name, graph in manifest.graphs.items():
        lines.append(name)
        for direction in ("inputs", "outputs"):
            lines += [
                f"  {direction[:-1]:7} {port['name']}: {port['elem_type'].lower()} "
                f"[{', '.join(map(str, port['dims']))}]"
                for port in graph[direction]
            ]
    lines += [f"{name}  {entry['bytes']:,} bytes" for name, entry in manifest.files.items()]
    return Inspection(content, "\n".join([*lines, plan.text]))
