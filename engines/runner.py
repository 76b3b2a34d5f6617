"""What a runner is: something that runs an ONNX graph or an engine made from one, on host arrays.

A runner is a context manager; outside the `with` block it holds no session and no device memory. Inputs
are checked for name, dtype and shape before inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

CACHE_INPUT_PREFIX = "past_key_values."
CACHE_OUTPUT_PREFIX = "present."


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of a graph input or output; a dynamic dimension is its symbol."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.dims))}]"


class Runner(Protocol):
    """An opened graph or engine: what it reads and computes. Closed when the `with` block ends."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class GraphRunner(Runner, Protocol):
    """Runs a graph once per call, nothing kept in between."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name for the given inputs by name."""
        ...


class DecoderRunner(Runner, Protocol):
    """Runs a decoder step by step and keeps its KV cache between steps, on the device where it has one.

    Cache inputs are called `past_key_values.*` and outputs `present.*`; callers never pass them.
    """

    def reset(self) -> None:
        """Forget the cache; the next step is a prefill."""
        ...

    def step(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one step and extend the cache; the outputs by name, those of the cache left out."""
        ...

    def cache(self) -> dict[str, NDArray[Any]]:
        """A copy of the cache on the host, by output name."""
        ...


def cache_pairs(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Which output feeds which cache input of the next step: `past_key_values.0.key` -> `present.0.key`.

    Raises `InputError` when a cache input has no output of its name.
    """
    names = {spec.name for spec in outputs}
    pairs = {
        spec.name: CACHE_OUTPUT_PREFIX + spec.name.removeprefix(CACHE_INPUT_PREFIX)
        for spec in inputs
        if spec.name.startswith(CACHE_INPUT_PREFIX)
    }
    if missing := sorted(set(pairs.values()) - names):
        raise InputError(f"the decoder has no output {missing[0]!r} to feed its cache from")
    return pairs


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, NDArray[Any]]) -> None:
    """Raise `InputError` for an input that is missing, unknown, of another dtype, rank or fixed dimension."""
    known = {spec.name: spec for spec in specs}
    if missing := sorted(set(known) - set(feeds)):
        raise InputError(f"input {missing[0]!r} is missing; the graph reads {', '.join(known)}")
    if unknown := sorted(set(feeds) - set(known)):
        raise InputError(f"input {unknown[0]!r} is unknown; the graph reads {', '.join(known)}")
    symbols: dict[str, int] = {}
    for name, spec in known.items():
        array = feeds[name]
        if array.dtype != spec.dtype:
            raise InputError(f"input {name!r} is {array.dtype}; expected {spec.dtype}")
        if array.ndim != len(spec.dims):
            raise InputError(f"input {name!r} has shape {array.shape}; expected {spec}")
        for size, dim in zip(array.shape, spec.dims, strict=True):
            wanted = dim if isinstance(dim, int) else symbols.setdefault(dim, size)
            if size != wanted:
                raise InputError(
                    f"input {name!r} has shape {array.shape}; expected {wanted} for {dim} in {spec}"
                )
