"""What the files of other tools have in common: one vector per layer, added to the residual stream.

Dimensions: D width, L decoder blocks. A *boundary* b, 0 to L, is the stream between two blocks: what block b reads and
block b − 1 returns. An addition at `block_input` of b and one at `block_output` of b − 1 are the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError
from calibration.plan import Add, Positions, Site, SteeringPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_LAYER = 99_999
"""A layer number above this is damage, not depth."""


@dataclass(frozen=True)
class LayerVectors:
    """The vectors of one foreign file.

    `by_layer`: 0-based decoder block -> (D,) float32. `site`: where that tool adds them. `details`: what else the file
    says, for the provenance. `notes`: what a user has to know of this file. Raises `InputError` for no vectors,
    vectors of different widths, values that are not finite and layers that no model has.
    """

    format: str
    site: Site
    by_layer: Mapping[int, NDArray[np.float32]]
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.by_layer:
            raise InputError("it holds no vectors; expected one per steered layer")
        width = len(next(iter(self.by_layer.values())))
        for layer, vector_D in self.by_layer.items():
            if not -MAX_LAYER <= layer <= MAX_LAYER:
                raise InputError(f"layer {layer} is no layer of a model; expected at most {MAX_LAYER}")
            if vector_D.ndim != 1 or not vector_D.size or len(vector_D) != width:
                raise InputError(
                    f"the vector of layer {layer} has shape {vector_D.shape}; expected ({width},), as of the first"
                )
            if bad := int(vector_D.size - np.isfinite(vector_D).sum()):
                raise InputError(
                    f"the vector of layer {layer} has {bad} values that are NaN or infinite in float32; "
                    "expected finite ones"
                )

    @property
    def hidden_size(self) -> int:
        """D, the width of the vectors."""
        return len(next(iter(self.by_layer.values())))


def plan_of(
    vectors: LayerVectors,
    *,
    num_layers: int,
    strength: float,
    positions: Positions,
    provenance: Mapping[str, Any],
) -> SteeringPlan:
    """The plan that adds `vectors` where their tool adds them. Raises `InputError` for a layer outside the model."""
    resolved = {
        layer + num_layers if layer < 0 else layer: vector_D for layer, vector_D in vectors.by_layer.items()
    }
    if len(resolved) < len(vectors.by_layer):
        raise InputError(f"a layer is named twice, from the start and from the end of {num_layers} blocks")
    if outside := sorted(layer for layer in resolved if not 0 <= layer < num_layers):
        raise InputError(
            f"it holds a vector for layer {outside[0]}; a model of {num_layers} blocks has 0 to {num_layers - 1}: "
            "give the model's own number with --num-layers"
        )
    edits = tuple(
        Add(layer=layer, vector=resolved[layer], strength=strength, site=vectors.site, positions=positions)
        for layer in sorted(resolved)
    )
    return SteeringPlan(vectors.hidden_size, num_layers, edits, provenance)


def as_float32(where: str, values: Any) -> NDArray[np.float32]:
    """Numbers as a float32 vector (D,); raises `InputError` for anything else."""
    try:
        array = np.asarray(values)
        if array.dtype == object or array.dtype.kind not in "fiu":
            raise ValueError(f"{array.dtype}")
        with np.errstate(over="ignore"):
            return np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{where} is no list of numbers ({reason}); expected one vector") from None
