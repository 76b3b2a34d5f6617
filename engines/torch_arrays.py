"""Tensors of PyTorch as numpy arrays and back, bfloat16 included, which neither knows of the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy of a tensor as an array, made on the stream that is active."""
    copy = tensor.to("cpu", copy=True)
    if copy.dtype == torch.bfloat16:
        return copy.view(torch.int16).numpy().view(BFLOAT16)
    array: NDArray[Any] = copy.numpy()
    return array


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor on the host, its memory shared where PyTorch can: it reads no read-only arrays."""
    writable = np.require(array, requirements=["C", "W"])
    if writable.dtype == BFLOAT16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)
