"""What is in a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.overlap import SEEN
from calibration.plan import SteeringPlan
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.range_guard import PROVENANCE_KEY, plan_magnitudes

if TYPE_CHECKING:
    from pathlib import Path


def inspect_plan(path: Path) -> Inspection:
    """Edits and provenance of a plan."""
    plan = SteeringPlan.load(path)
    edits: list[dict[str, Any]] = [
        {
            "layer": edit.layer,
            "site": edit.site.value,
            "op": edit.op,
            "positions": edit.positions.value,
            "strength": edit.strength,
            "tensors": {
                name: {"shape": list(tensor.shape), "norm": float(np.linalg.norm(tensor))}
                for name, tensor in edit.tensors().items()
            },
        }
        for edit in plan.edits
    ]
    lines = [f"plan for {plan.num_layers} blocks of width {plan.hidden_size}, sha256 {plan.digest()[:12]}"]
    for edit in edits:
        tensors = ", ".join(f"|{name}| {entry['norm']:.4g}" for name, entry in edit["tensors"].items())
        lines.append(
            f"  block {edit['layer']:3}  {edit['site']:18} {edit['op']:8} {edit['positions']:5} "
            f"strength {edit['strength']:g}  {tensors}"
        )
    shown = dict(plan.provenance)
    if (found := plan_magnitudes(plan)) is not None:
        shown[PROVENANCE_KEY] = f"{max(found.unsteered):g} unsteered, {max(found.steered):g} steered"
    if isinstance(seen := shown.get(SEEN), dict):
        kinds = {kind: digests for kind, digests in seen.items() if isinstance(digests, list)}
        shown[SEEN] = ", ".join(f"{len(digests)} {kind}" for kind, digests in kinds.items())
    lines += [f"  {name}: {value}" for name, value in shown.items()]
    content = {
        "kind": "plan",
        "hidden_size": plan.hidden_size,
        "num_layers": plan.num_layers,
        "sha256": plan.digest(),
        "edits": edits,
        "provenance": dict(plan.provenance),
    }
    return Inspection(content, "\n".join(lines))
