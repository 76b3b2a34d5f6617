"""Names that insertion gives: nodes, tensors and constants of steering, and the tensors it renames."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import NodeProto

    from calibration.plan import Edit

STEERING_PREFIX = "sarsteer."
"""Names of inserted nodes, tensors and constants start with this."""
UNSTEERED_PREFIX = STEERING_PREFIX + "unsteered."
"""A steered tensor keeps its name; what its producer computes is renamed to this and the name."""
STEERED_PREFIX = STEERING_PREFIX + "steered."
"""A steered graph input cannot be renamed; its consumers read this and the name."""
NAME_PARTS = 6
"""sarsteer . layer . site . op . n . tensor or node."""
LAYER = re.compile(r"[0-9]{1,9}")
"""How a layer is written; other digits that Unicode knows, and numbers that Python does not read, are none."""


def is_steering(node: NodeProto) -> bool:
    """Whether a node was inserted by this project."""
    return node.name.startswith(STEERING_PREFIX)


def edit_names(edits: Sequence[Edit]) -> list[str]:
    """Stable unique names `sarsteer.{layer}.{site}.{op}.{n}`; n counts edits of one site and operation."""
    seen: Counter[str] = Counter()
    names = []
    for edit in edits:
        stem = f"{STEERING_PREFIX}{edit.layer}.{edit.site.value}.{edit.op}"
        names.append(f"{stem}.{seen[stem]}")
        seen[stem] += 1
    return names


def edit_of(name: str) -> str | None:
    """The edit `sarsteer.{layer}.{site}.{op}.{n}` that a node or constant belongs to, or None.

    What steering shares, masks of positions and factors of strength, belongs to no edit.
    """
    edit, _, _ = name.rpartition(".")
    parts = name.split(".")
    belongs = name.startswith(STEERING_PREFIX) and len(parts) == NAME_PARTS and LAYER.fullmatch(parts[1])
    return edit if belongs else None
