"""Run engines of TensorRT and TensorRT-RTX: one-shot graphs, and decoders whose KV cache stays on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import EngineError, InputError
from engines.runner import cache_pairs, check_feeds
from engines.torch_arrays import to_host
from engines.trt.device import allocate, fill
from engines.trt.opened import OpenEngine, check_torch_cuda, compiles_at_run_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from engines.backends import Backend

__all__ = ["TensorRTDecoder", "TensorRTRunner", "check_torch_cuda"]


@dataclass
class _Call:
    """A call whose tensors stay where they are, so that the next one of the same shapes can be replayed."""

    context: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    enqueue: Callable[[], None]
    captured: bool = False


class TensorRTRunner(OpenEngine):
    """Runs an engine once per call.

    As long as the shapes stay the same, so do the tensors, and the second call is captured in a CUDA graph that the
    following calls replay; TensorRT-RTX does this by itself. An engine that cannot be captured runs without.
    """

    _fixed_shapes = True
    _call: _Call | None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises `InputError` for inputs that fit neither the engine nor any of its profiles, `EngineError` when
        TensorRT fails, `RuntimeError` outside the `with` block.
        """
        self._require_open()
        check_feeds(self.inputs, feeds)
        with self._working():
            call = self._call
            repeated = call is not None and all(
                tuple(tensor.shape) == feeds[name].shape for name, tensor in call.inputs.items()
            )
            if call is None or not repeated:
                self._call = None
                call = self._new_call(feeds)
            for name, tensor in call.inputs.items():
                fill(tensor, feeds[name])
            if repeated and not call.captured and not compiles_at_run_time(self._trt):
                self._capture(call)
            call.enqueue()
            self._stream.synchronize()
            self._call = call
            return {name: to_host(tensor) for name, tensor in call.outputs.items()}

    def _close(self) -> None:
        self._call = None
        super()._close()

    def _new_call(self, feeds: Mapping[str, NDArray[Any]]) -> _Call:
        inputs = {
            spec.name: allocate(feeds[spec.name].shape, spec.dtype, self._device) for spec in self.inputs
        }
        context, outputs = self._bind(inputs)
        return _Call(context, inputs, outputs, lambda: self._enqueue(context))

    def _capture(self, call: _Call) -> None:
        call.captured = True  # tried once, whatever comes of it
        try:
            call.enqueue = self._stream.capture(call.enqueue)
        except (RuntimeError, EngineError):  # some layers cannot be captured; the engine runs all the same
            self._log.start()


class TensorRTDecoder(OpenEngine):
    """Runs a decoder engine step by step; what one step adds to the cache is handed to the next by its address.

    Nothing is captured in a CUDA graph: the past is longer at every step, so that no two have the same shapes.
    """

    _fixed_shapes = False
    _cache: dict[str, torch.Tensor]

    def __init__(self, engine: str | Path, *, backend: Backend, device: str = "cuda") -> None:
        super().__init__(engine, backend=backend, device=device)
        self._pairs = cache_pairs(self.inputs, self.outputs)
        self._fed = tuple(spec for spec in self.inputs if spec.name not in self._pairs)

    def _close(self) -> None:
        self._cache = {}
        super()._close()

    def reset(self) -> None:
        """Forget the cache; the next step is a prefill."""
        self._cache = {}

    def step(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one step and extend the cache; the outputs by name, those of the cache left out.

        Raises `InputError` for inputs that fit neither the engine nor any of its profiles, `EngineError` when
        TensorRT fails, `RuntimeError` outside the `with` block. The cache is then what it was before.
        """
        self._require_open()
        check_feeds(self._fed, feeds)
        with self._working():
            inputs = {}
            for spec in self._fed:
                inputs[spec.name] = allocate(feeds[spec.name].shape, spec.dtype, self._device)
                fill(inputs[spec.name], feeds[spec.name])
            inputs |= self._past(batch=next(iter(feeds.values())).shape[0])
            context, outputs = self._bind(inputs)
            self._enqueue(context)
            self._stream.synchronize()
            self._cache = {name: outputs.pop(name) for name in self._pairs.values()}
            return {name: to_host(tensor) for name, tensor in outputs.items()}

    def cache(self) -> dict[str, NDArray[Any]]:
        """A copy of the cache on the host, by output name."""
        self._require_open()
        with self._working():
            return {name: to_host(tensor) for name, tensor in self._cache.items()}

    def _past(self, *, batch: int) -> dict[str, torch.Tensor]:
        """The cache by input name; before the first step one of no positions, whose symbols are batch and past."""
        past = {}
        for spec in self.inputs:
            if spec.name not in self._pairs:
                continue
            tensor = self._cache.get(self._pairs[spec.name])
            if tensor is None:
                shape = (batch if axis == 0 else 0 for axis in range(len(spec.dims)))
                fixed = zip(spec.dims, shape, strict=True)
                tensor = allocate(
                    tuple(dim if isinstance(dim, int) else size for dim, size in fixed),
                    spec.dtype,
                    self._device,
                )
            elif tensor.shape[0] != batch:
                raise InputError(
                    f"the cache is of batch {tensor.shape[0]} and the step of batch {batch}; reset first"
                )
            past[spec.name] = tensor
        return past
