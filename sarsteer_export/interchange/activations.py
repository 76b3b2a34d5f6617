"""The activation checkpoint of SARSteer's reference repository (`defense.py`, `save_checkpoint`).

`torch.save` of four dicts from 0-based block to a list of tensors (D,), one per request, in the model's dtype: block
outputs at the last position for `harm_hiddens` (harmful audio), `harm_refusal_hiddens` (the same with the refusal
text), `safe_hiddens` (benign audio) and `safe_refusal_hiddens`, which no vector is computed from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from calibration.states import CalibrationStates

HARMFUL, REFUSED, BENIGN = "harm_hiddens", "harm_refusal_hiddens", "safe_hiddens"


def activation_states(content: object) -> CalibrationStates | None:
    """The states of a loaded checkpoint, float32, or None when it is of another kind.

    Raises `InputError` naming the entry for blocks that are missing, lists of different lengths, tensors of another
    shape, and fewer than two benign requests.
    """
    from calibration.states import CalibrationStates

    if not isinstance(content, dict) or not {HARMFUL, BENIGN} <= set(content):
        return None
    harmful_NLD, refused_NLD, benign_NLD = (_stacked(content, name) for name in (HARMFUL, REFUSED, BENIGN))
    if harmful_NLD.shape != refused_NLD.shape or harmful_NLD.shape[1:] != benign_NLD.shape[1:]:
        raise InputError(
            f"{HARMFUL}, {REFUSED} and {BENIGN} are {harmful_NLD.shape}, {refused_NLD.shape} and {benign_NLD.shape} "
            "(requests, blocks, width); expected the first two alike, and one depth and width"
        )
    if len(benign_NLD) < 2:
        raise InputError(f"{BENIGN} has {len(benign_NLD)} request; expected at least 2")
    return CalibrationStates(harmful_NLD, refused_NLD, benign_NLD)


def _stacked(content: dict[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One entry as (N, L, D) float32."""
    import torch

    layers = content.get(name)
    if (
        not isinstance(layers, dict)
        or not layers
        or sorted(layers, key=str) != sorted(range(len(layers)), key=str)
    ):
        raise InputError(f"{name} is no dict over the blocks 0, 1, 2, … of a model")
    counts = {len(layers[layer]) if isinstance(layers[layer], list) else -1 for layer in layers}
    if len(counts) > 1 or min(counts) < 1:
        raise InputError(
            f"{name} has no list of tensors for every block, of one length; is the checkpoint whole?"
        )
    rows = [layers[layer] for layer in range(len(layers))]
    first = rows[0][0]
    for layer, row in enumerate(rows):
        for number, tensor in enumerate(row):
            dense = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if not dense or tensor.layout != torch.strided or tensor.ndim != 1 or tensor.shape != first.shape:
                raise InputError(
                    f"{name}[{layer}][{number}] is no vector like the first; expected shape (D,)"
                )
    stacked: np.ndarray[Any, np.dtype[np.float32]] = torch.stack(
        [torch.stack([tensor.detach().float() for tensor in row]) for row in rows], dim=1
    ).numpy()
    return stacked
