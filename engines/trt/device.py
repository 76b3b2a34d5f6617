"""Device memory and the stream that orders work on it, by PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from engines.torch_arrays import as_tensor
from engines.trt.api import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES.values()}
"""PyTorch's element types by their numpy names, which are the same."""


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
    tensor.copy_(as_tensor(array))
