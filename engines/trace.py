"""Teacher-forced traces: what a decoder computes when it is fed a fixed script of steps.

Dimensions: B batch, S sequence of a step, T past and present, H KV heads, W head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from engines.runner import DecoderRunner

LOGITS = "logits"


@dataclass(frozen=True)
class Script:
    """The inputs of a prefill and the decode steps after it, each by input name, and a name for the case.

    Every step holds `attention_mask` (B, T), whose last S columns say which positions of the step count.
    """

    name: str
    steps: tuple[Mapping[str, NDArray[Any]], ...]
    sequences: tuple[int, ...]

    def attended(self, step: int) -> NDArray[np.bool_]:
        """Which positions of a step count, bool (B, S)."""
        mask_BT = self.steps[step]["attention_mask"]
        return np.asarray(mask_BT[:, -self.sequences[step] :] != 0)

    def attended_cache(self) -> NDArray[np.bool_]:
        """Which cache positions count after the last step, bool (B, T)."""
        return np.asarray(self.steps[-1]["attention_mask"] != 0)


@dataclass(frozen=True)
class Trace:
    """What came out: per step logits (B, S, V) and any stream tensors (B, S, D); the last cache (B, H, T, W)."""

    steps: tuple[Mapping[str, NDArray[Any]], ...]
    cache: Mapping[str, NDArray[Any]]


def record(runner: DecoderRunner, script: Script) -> Trace:
    """Run a script on a decoder, its cache carried from step to step."""
    runner.reset()
    steps = tuple(runner.step(feeds) for feeds in script.steps)
    return Trace(steps, runner.cache())


def comparable(oracle: Trace, engine: Trace) -> str | None:
    """Why two traces cannot be compared, or None: everything present, finite, of equal shape and dtype."""
    if len(oracle.steps) != len(engine.steps):
        return f"{len(engine.steps)} steps; expected {len(oracle.steps)}"
    pairs = [
        *(
            (f"step {number}", *pair)
            for number, pair in enumerate(zip(oracle.steps, engine.steps, strict=True))
        ),
        ("cache", oracle.cache, engine.cache),
    ]
    for where, wanted, seen in pairs:
        if set(wanted) != set(seen):
            return f"{where}: outputs {sorted(set(wanted) ^ set(seen))} are on one side only"
        for name, expected in wanted.items():
            actual = seen[name]
            if actual.shape != expected.shape or actual.dtype != expected.dtype:
                return f"{where}: {name} is {actual.dtype} {actual.shape}; expected {expected.dtype} {expected.shape}"
            if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
                return f"{where}: {name} holds NaN or infinite values"
    return None
