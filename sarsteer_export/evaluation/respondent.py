"""Who is asked: a model on one runtime, undefended or steered by a plan. Needs no torch.

Dimensions: B requests, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest


@dataclass(frozen=True)
class Reply:
    """A greedy answer: its text, and its tokens up to and with the one that ended it, if one did."""

    text: str
    tokens: tuple[int, ...]


class Speaker(Protocol):
    """A model on one runtime, as one plan steers it or none."""

    def replies(self, requests: Sequence[SpokenRequest], *, max_new_tokens: int) -> list[Reply]:
        """Greedy answers to a batch of requests."""
        ...

    def log_probabilities(
        self, requests: Sequence[SpokenRequest], tokens: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities (B, V) of the next token before each of the given ones, forced one after another.

        Every token is decoded in a pass of its own, with the cache of those before: steering acts in each pass. As
        many steps as the longest row has tokens; what a shorter row gets behind its end means nothing.
        """
        ...


class Respondent(Protocol):
    """A model on one runtime."""

    @property
    def runtime(self) -> str:
        """What reports call it."""
        ...

    def serves(self, plan: SteeringPlan | None) -> bool:
        """Whether the model can be asked as this plan steers it, or undefended, on this runtime."""
        ...

    def speaker(self, plan: SteeringPlan | None) -> AbstractContextManager[Speaker]:
        """The model as a plan steers it, or undefended, for the length of a `with` block. Blocks may be nested."""
        ...


def log_softmax(logits_BV: NDArray[Any]) -> NDArray[np.float32]:
    """Log-probabilities (B, V), computed in float64."""
    shifted_BV = logits_BV.astype(np.float64)
    shifted_BV -= shifted_BV.max(axis=-1, keepdims=True)
    normed_BV = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=-1, keepdims=True))
    return np.asarray(normed_BV, dtype=np.float32)
