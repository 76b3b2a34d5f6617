"""Device memory and the stream that orders work on it, by PyTorch: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from engines.trt.api import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES.values()}
"""PyTorch's element types by their numpy names, which are the same."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class CudaStream:
    """A stream that is not the default one, on which a runner orders everything it does."""

    def __init__(self, device: str) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """The `cudaStream_t`."""
        return int(self._stream.cuda_stream)

    def active(self) -> AbstractContextManager[None]:
        """Copies and allocations of PyTorch inside the block are ordered on this stream."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues as a CUDA graph, not run yet; returns what enqueues it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> torch.Tensor:
    """A contiguous tensor with memory of its own, also when it has no elements.

    TensorRT wants an address for an empty tensor too, and no two tensors at one address.
    """
    count = math.prod(shape)
    flat = torch.empty(max(count, 1), dtype=TORCH_DTYPES[dtype.name], device=device)
    return flat[:count].view(shape)


def address(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor made by `allocate` begins; `data_ptr` is 0 for one without elements."""
    return int(tensor.untyped_storage().data_ptr())


def fill(tensor: torch.Tensor, array: NDArray[Any]) -> None:
    """Copy an array of the same shape and dtype into a tensor, on the stream that is active."""
    tensor.copy_(_as_tensor(array))


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy of a tensor as an array, made on the stream that is active."""
    copy = tensor.to("cpu", copy=True)
    if copy.dtype == torch.bfloat16:
        return copy.view(torch.int16).numpy().view(BFLOAT16)
    array: NDArray[Any] = copy.numpy()
    return array


def _as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor on the host; PyTorch reads neither bfloat16 nor read-only arrays from numpy."""
    writable = np.require(array, requirements=["C", "W"])
    if writable.dtype == BFLOAT16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)
