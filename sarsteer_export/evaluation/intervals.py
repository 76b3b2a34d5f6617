"""Intervals around what a handful of prompts shows: the percentile bootstrap, and formulas where it is blind.

The bootstrap draws prompts again with replacement. Where every prompt came out alike it can only draw the same once
more and gives an interval of no width, however few prompts there were; there the formulas hold: Wilson's interval
for a share, Bonett and Price's for a difference of paired shares.

Dimensions: N prompts, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_RESAMPLES = 100_000


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `resamples` of the prompts, two-sided at `confidence`, seeded."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 100 <= self.resamples <= MOST_RESAMPLES:
            raise InputError(f"bootstrap is {self.resamples} resamples; expected 100 to {MOST_RESAMPLES}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected at least 0.5 and less than 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected at least 0")


@dataclass(frozen=True)
class Interval:
    """An interval by a named method."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Estimate:
    """A figure over `prompts` prompts, and how far it may be off.

    `bootstrap`: the percentile bootstrap. `formula`: an interval that does not shrink to nothing where all prompts
    came out alike; None where there is none. `alike`: whether they did.
    """

    value: float
    bootstrap: Interval
    formula: Interval | None
    prompts: int
    alike: bool

    @property
    def interval(self) -> Interval:
        """The interval to show: the bootstrap, or the formula where the bootstrap is blind."""
        return self.formula if self.alike and self.formula is not None else self.bootstrap


def share(values_N: NDArray[np.float64], settings: Bootstrap) -> Estimate:
    """The mean of shares in [0, 1], one per prompt, with Wilson's interval for as many prompts."""
    return _mean(values_N, np.ones_like(values_N), settings, wilson(values_N, settings.confidence))


def difference(values_N: NDArray[np.float64], others_N: NDArray[np.float64], settings: Bootstrap) -> Estimate:
    """The mean of `values_N - others_N`, shares of the same prompts in the same order."""
    differences_N = values_N - others_N
    formula = bonett_price(differences_N, settings.confidence)
    return _mean(differences_N, np.ones_like(differences_N), settings, formula)


def ratio(sums_N: NDArray[np.float64], counts_N: NDArray[np.float64], settings: Bootstrap) -> Estimate:
    """The mean over all tokens of sums over each prompt's `counts_N` tokens; prompts are what is drawn."""
    return _mean(sums_N, counts_N, settings, None)


def wilson(values_N: NDArray[np.float64], confidence: float) -> Interval:
    """Wilson's score interval for the mean of N outcomes (Wilson 1927)."""
    count, value, z = len(values_N), float(values_N.mean()), _z(confidence)
    centre = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    # Exactly at the ends, where the rounding of the formula leaves 1e-17 beside them.
    low, high = 0.0 if value == 0 else centre - half, 1.0 if value == 1 else centre + half
    return Interval(max(0.0, low), min(1.0, high), "Wilson")


def bonett_price(differences_N: NDArray[np.float64], confidence: float) -> Interval:
    """The adjusted Wald interval for a difference of paired shares (Bonett and Price 2012)."""
    count = len(differences_N)
    up = (float(differences_N.clip(min=0).sum()) + 1) / (count + 2)
    down = (float((-differences_N).clip(min=0).sum()) + 1) / (count + 2)
    half = _z(confidence) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half), "Bonett-Price")


def _mean(
    sums_N: NDArray[np.float64],
    counts_N: NDArray[np.float64],
    settings: Bootstrap,
    formula: Interval | None,
) -> Estimate:
    draws_RN = _draws(settings.resamples, settings.seed, len(sums_N))
    with np.errstate(invalid="ignore"):  # an infinite divergence makes NaN of 0 draws of it
        means_R = (draws_RN @ sums_N) / (draws_RN @ counts_N)
        tail = (1 - settings.confidence) / 2
        low, high = np.quantile(means_R, [tail, 1 - tail])
    per_prompt_N = sums_N / counts_N
    return Estimate(
        value=float(sums_N.sum() / counts_N.sum()),
        bootstrap=Interval(float(low), float(high), "bootstrap"),
        formula=formula,
        prompts=len(sums_N),
        alike=bool((per_prompt_N == per_prompt_N[0]).all()),
    )


@lru_cache(maxsize=4)
def _draws(resamples: int, seed: int, prompts: int) -> NDArray[np.float64]:
    """How often each prompt is drawn in each resample (R, N): the same for every system, so that they are paired."""
    random = np.random.default_rng(seed)
    draws_RN = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
    draws_RN.setflags(write=False)
    return draws_RN


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
