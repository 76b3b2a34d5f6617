"""What is in a file of another tool's vectors, or of SARSteer activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.plan import SteeringPlan
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.inspection.plan import inspect_plan
from sarsteer_export.interchange.reading import read_source
from sarsteer_export.interchange.vectors import LayerVectors

if TYPE_CHECKING:
    from pathlib import Path


def inspect_vectors(path: Path) -> Inspection:
    """Layers, norms and meaning of a foreign file; nothing in a pickle is run."""
    source = read_source(path)
    found = source.content
    if isinstance(found, SteeringPlan):
        return inspect_plan(path)
    if not isinstance(found, LayerVectors):
        shapes = {
            name: list(getattr(found, f"{name}_NLD").shape) for name in ("harmful", "refused", "benign")
        }
        lines = [
            f"  {name}: {n} requests, {blocks} blocks, width {width}"
            for name, (n, blocks, width) in shapes.items()
        ]
        content: dict[str, Any] = {"kind": "activations", "sha256": source.sha256, "shapes": shapes}
        return Inspection(content, "\n".join([f"SARSteer activations, sha256 {source.sha256[:12]}", *lines]))
    norms = {layer: float(np.linalg.norm(found.by_layer[layer])) for layer in sorted(found.by_layer)}
    lines = [
        f"{found.format}, width {found.hidden_size}, added at every position at the {found.site.value} of:",
        *(f"  block {layer:3}  |vector| {norm:.4g}" for layer, norm in norms.items()),
        *(f"  {name}: {value}" for name, value in found.details.items()),
        *(f"  note: {note}" for note in found.notes),
    ]
    content = {
        "kind": "vectors",
        "format": found.format,
        "sha256": source.sha256,
        "hidden_size": found.hidden_size,
        "site": found.site.value,
        "norms": norms,
        "details": dict(found.details),
        "notes": list(found.notes),
    }
    return Inspection(content, "\n".join(lines))
