"""Intervals hold what they say they hold, and do not shrink to nothing where prompts came out alike."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.errors import InputError
from sarsteer_export.evaluation.intervals import Bootstrap, bonett_price, difference, ratio, share, wilson

ONES, ZEROS = np.ones(50), np.zeros(50)


def outcomes(count: int, total: int) -> np.ndarray:
    return np.array([1.0] * count + [0.0] * (total - count))


def test_wilson_is_the_published_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17: 857-872, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, total), (low, high) in published.items():
        found = wilson(outcomes(count, total), 0.95)
        assert found.low == pytest.approx(low, abs=5e-5)  # printed with four digits
        assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("count", [1, 3, 20, 40, 41, 50, 101])
def test_wilson_ends_exactly_where_all_came_out_alike(count: int) -> None:
    assert wilson(np.zeros(count), 0.95).low == 0.0
    assert wilson(np.ones(count), 0.95).high == 1.0


def test_bonett_price_follows_its_formula() -> None:
    # 8 of 20 pairs went up, 2 went down: (9 - 3) / 22 -+ 1.959964 sqrt((9/22 + 3/22 - (6/22)^2) / 22)
    found = bonett_price(np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 10), 0.95)
    middle, half = 6 / 22, 1.959964 * np.sqrt((12 / 22 - (6 / 22) ** 2) / 22)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_the_bootstrap_has_the_width_of_the_normal_approximation() -> None:
    values = outcomes(200, 500)
    found = share(values, Bootstrap(resamples=5000)).bootstrap
    half = 1.96 * np.sqrt(0.4 * 0.6 / 500)
    # 500 prompts make shares of steps of 0.002; quantiles of 5000 resamples are good to about that
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.005)
    narrow = share(values, Bootstrap(resamples=5000, confidence=0.8)).bootstrap
    assert found.low < narrow.low < 0.4 < narrow.high < found.high


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    values = outcomes(20, 50)
    sums, counts = np.linspace(0.1, 2.0, 50), np.full(50, 7.0)
    assert share(values, Bootstrap()) == share(values, Bootstrap())
    assert ratio(sums, counts, Bootstrap()) == ratio(sums, counts, Bootstrap())
    assert ratio(sums, counts, Bootstrap()) != ratio(sums, counts, Bootstrap(seed=1))


@pytest.mark.parametrize(("values", "low", "high"), [(ZEROS, 0.0, 0.0713), (ONES, 0.9287, 1.0)])
def test_where_all_came_out_alike_the_formula_is_shown(values: np.ndarray, low: float, high: float) -> None:
    found = share(values, Bootstrap())
    assert found.alike
    assert found.bootstrap.low == found.bootstrap.high == found.value
    assert found.interval is found.formula
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (low, high), abs=5e-4
    )  # 1.96²/(50 + 1.96²)
    mixed = share(outcomes(1, 50), Bootstrap())
    assert not mixed.alike
    assert mixed.interval is mixed.bootstrap


def test_differences_are_paired() -> None:
    """The same 10 of 50 prompts fail on both sides: the difference is exactly 0, which unpaired ones are not."""
    before, after = outcomes(10, 50), outcomes(10, 50)
    found = difference(after, before, Bootstrap())
    assert found.alike
    assert (found.value, found.bootstrap.low, found.bootstrap.high) == (0.0, 0.0, 0.0)
    assert found.interval.low < 0 < found.interval.high
    moved = difference(outcomes(40, 50), before, Bootstrap())
    assert moved.value == pytest.approx(0.6, abs=1e-12)
    assert (
        0.45 < moved.bootstrap.low < 0.6 < moved.bootstrap.high < 0.75
    )  # 0.6 -+ 1.96 sqrt(.24 / 50) = 0.136


def test_a_ratio_weighs_tokens_and_draws_prompts() -> None:
    sums, tokens = np.array([1.0, 30.0]), np.array([1.0, 10.0])
    found = ratio(sums, tokens, Bootstrap())
    assert found.value == pytest.approx(31 / 11, abs=1e-12)  # not the mean of 1 and 3
    assert (found.bootstrap.low, found.bootstrap.high) == (1.0, 3.0)
    assert found.formula is None


def test_an_infinite_divergence_is_no_error() -> None:
    assert ratio(np.array([np.inf, 1.0, 1.0]), np.ones(3), Bootstrap()).value == np.inf


@pytest.mark.parametrize(
    "settings",
    [{"resamples": 99}, {"resamples": 10**6}, {"confidence": 1.0}, {"confidence": 0.4}, {"seed": -1}],
)
def test_settings_that_make_no_interval_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        Bootstrap(**settings)  # type: ignore[arg-type]
