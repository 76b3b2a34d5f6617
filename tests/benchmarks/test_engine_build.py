"""The build benchmark compares what it says, and stops when it would measure something else."""

from __future__ import annotations

from typing import Any

import click
import pytest

import engine_build
from engine_build import AGAIN, STEERED, UNSTEERED, Build, benchmark, compare, table
from random_decoder import Settings

TINY = Settings(2, 64, 50, positions=8, pairs=1, decode_pairs=1, threads=1, seed=0)


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {UNSTEERED: Build(1.0, 100, 10, 5), STEERED: Build(2.0, 100, 11, 6), AGAIN: Build(1.5, 100, 10, 5)},
        {UNSTEERED: Build(4.0, 200, 10, 5), STEERED: Build(4.0, 220, 11, 6), AGAIN: Build(4.0, 200, 10, 5)},
    ]
    found = compare(rounds)
    assert found["seconds"].ratio.median == pytest.approx(1.5)
    assert found["seconds"].noise_ratio.median == pytest.approx(1.25)
    assert found["peak_rss_bytes"].ratio.median == pytest.approx(1.05)
    assert found["layers"].ratio.median == pytest.approx(1.2)


def test_an_engine_without_its_steering_is_not_measured() -> None:
    sidecar: dict[str, Any] = {
        "steering": [],
        "build": {"seconds": 1.0, "peak_rss_bytes": 1, "layers": 1},
        "engine": {"bytes": 1},
    }
    with pytest.raises(click.ClickException, match="holds 0 steering vectors; expected 2"):
        Build.of(sidecar, 2)


def test_it_builds_real_engines_and_tells_people(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(engine_build, "pocket_decoder", engine_build.random_decoder)
    result = benchmark(TINY, "tensorrt-rtx", ("float16",), 1)
    assert [(one["precision"], one["edits"]) for one in result["results"]] == [("float16", 2)] * 2
    layers = result["results"][0]["figures"]["layers"]
    assert layers["steered"]["median"] > layers["unsteered"]["median"]
    assert layers["noise_ratio"]["median"] == 1
    text = table(result)
    assert "--engine tensorrt-rtx; medians and [quartiles] over 1 rounds" in text
    assert "| build time, s |" in text
