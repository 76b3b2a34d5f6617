"""Vectors of the Python package steering-vectors: its `SteeringVector` as `torch.save` pickles it.

Its hooks add `multiplier · layer_activations[i]` to what block i, counted from 0, returns; at every position, padding
included, unless the caller names others. The package has no file format: the object itself is saved, or its fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Site
from sarsteer_export.interchange.fitting import Fitted, Holding
from sarsteer_export.interchange.torch_files import PickledObject, save_by_name
from sarsteer_export.interchange.vectors import LayerVectors

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

CLASS = "steering_vectors.steering_vector.SteeringVector"
LAYER_TYPE = "decoder_block"
HOLDING = Holding(
    "a SteeringVector",
    "steering-vectors",
    Site.BLOCK_OUTPUT,
    elsewhere="; where the plan acts at `last`, pass min_token_index=None, token_indices=[-1] to its apply",
)


def steering_vector(content: object) -> LayerVectors | None:
    """The vectors of a loaded file, or None when it is of another kind.

    Understood are the object, a dict of its fields, and a dict from layer to tensor. Raises `UnsupportedError` for
    vectors of attention, MLP or norms, which no plan can hold, and `InputError` for fields of another type.
    """
    import torch

    fields = vars(content) if isinstance(content, PickledObject) else content
    if not isinstance(fields, dict):
        return None
    if not isinstance(content, PickledObject) and "layer_activations" not in fields:
        if not fields or not all(
            type(key) is int and isinstance(fields[key], torch.Tensor) for key in fields
        ):
            return None
        fields = {"layer_activations": fields}
    activations, layer_type = fields.get("layer_activations"), fields.get("layer_type", LAYER_TYPE)
    if not isinstance(activations, dict):
        raise InputError(
            f"layer_activations is {type(activations).__name__}; expected a dict from layer to tensor"
        )
    if layer_type != LAYER_TYPE:
        raise UnsupportedError(
            f"layer_type is {layer_type!r}; a plan edits the stream between blocks, which is {LAYER_TYPE!r}"
        )
    by_layer = {}
    for layer, tensor in activations.items():
        if type(layer) is not int:
            raise InputError(f"layer_activations has the key {layer!r}; expected the number of a layer")
        by_layer[layer] = _vector(layer, tensor)
    return LayerVectors("steering-vectors", Site.BLOCK_OUTPUT, by_layer)


def save_steering_vector(fitted: Fitted, path: Path) -> None:
    """Write a file that holds a `SteeringVector`, float32; the package itself is not needed."""
    import torch

    content = PickledObject()
    vars(content).update(
        layer_activations={layer: torch.tensor(vector_D) for layer, vector_D in fitted.by_layer.items()},
        layer_type=LAYER_TYPE,
    )
    save_by_name(content, CLASS, path)


def _vector(layer: int, tensor: Any) -> NDArray[np.float32]:
    """One tensor as (D,) float32; the package flattens whatever shape it has, ours has to be one row."""
    import torch

    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.is_floating_point()
        or tensor.layout != torch.strided
    ):
        raise InputError(f"layer_activations[{layer}] is no dense tensor of floating-point numbers")
    if tensor.ndim < 1 or tensor.numel() != tensor.shape[-1]:
        raise InputError(f"layer_activations[{layer}] has shape {tuple(tensor.shape)}; expected (D,)")
    values: NDArray[np.float32] = tensor.detach().float().reshape(-1).numpy()
    return values
