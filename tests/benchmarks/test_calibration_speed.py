"""The benchmark of calibration at toy size: what it prints, and that all ways compute the same vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_speed.py"
SIZES = ("--rounds", "2", "--limit", "3", "--batch-size", "2", "--threads", "1")


@pytest.fixture(scope="module")
def result() -> Any:
    command = [sys.executable, str(SCRIPT), *SIZES, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_way_is_measured_against_the_plain_loop(result: Any) -> None:
    assert list(result["ways"]) == ["plain loop", "collect", "calibrate"]
    plain, *others = (found["throughput_ratio"] for found in result["ways"].values())
    assert set(plain.values()) == {1.0}
    assert all(value > 0 for ratio in others for value in ratio.values())


def test_all_ways_agree(result: Any) -> None:
    for found in result["ways"].values():  # what calibration promises: cosine 0.99999, norm within 0.1 %
        assert found["worst_1_minus_cosine"] <= 1e-5
        assert found["worst_norm_error"] <= 1e-3
