"""The table of limits: every row is strict enough to mean something and says where it comes from."""

from __future__ import annotations

import math

import pytest

from calibration.errors import UnsupportedError
from engines.limits import LIMITS, Limits, limits_for


@pytest.mark.parametrize("key", LIMITS, ids="/".join)
def test_a_row_of_limits_is_sane_and_says_why(key: tuple[str, str]) -> None:
    limits = limits_for(*key)
    assert limits is LIMITS[key]
    assert 0 < limits.max_abs <= 0.05
    assert 0.99 <= limits.cosine < 1
    assert 0 < limits.kl <= 0.05
    assert 0.9 <= limits.top1 <= 1
    assert 0.99 <= limits.effect_cosine < 1
    assert 0 < limits.effect_ratio <= 0.1
    assert 0 < limits.effect_floor <= limits.max_abs
    assert len(limits.source.split()) >= 10


def test_a_narrower_type_is_allowed_more_never_less() -> None:
    wide, narrow = limits_for("onnxruntime-cpu", "float32"), limits_for("onnxruntime-cpu", "float16")
    for name in ("max_abs", "kl", "effect_ratio", "effect_floor"):
        assert getattr(wide, name) < getattr(narrow, name)
    for name in ("cosine", "effect_cosine"):
        assert getattr(wide, name) > getattr(narrow, name)


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime-cpu", "int4"), ("abacus", "float32")])
def test_a_pair_without_limits_is_refused_by_name(backend: str, precision: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        limits_for(backend, precision)
    assert f"{backend}/{precision}" in str(error.value)
    assert "onnxruntime-cpu/float32" in str(error.value)
    assert error.value.exit_code == 3


def test_limits_are_finite() -> None:
    for limits in LIMITS.values():
        assert isinstance(limits, Limits)
        values = [value for value in vars(limits).values() if isinstance(value, float)]
        assert len(values) == 7
        assert all(map(math.isfinite, values))
