"""The grid of a sweep, and how its strengths and blocks are written down."""

from __future__ import annotations

import itertools
import math

import pytest

from calibration.errors import InputError
from sarsteer_export.cli.options import parse_layers
from sarsteer_export.sweeping.grid import Grid, Line, geometric, layers_text, parse_alphas


def test_a_geometric_series_has_both_ends_and_one_ratio() -> None:
    found = geometric(0.05, 2.0, 12)
    assert (len(found), found[0], found[-1]) == (12, 0.05, 2.0)
    ratios = [after / before for before, after in itertools.pairwise(found)]
    # Three significant digits: each value is off by at most half a unit in the third, 0.5 %.
    assert all(math.isclose(ratio, 40 ** (1 / 11), rel_tol=0.01) for ratio in ratios)


def test_the_e24_series_is_cut_at_both_ends_and_runs_through_decades() -> None:
    assert parse_alphas("e24:0.082:0.13") == (0.082, 0.091, 0.1, 0.11, 0.12, 0.13)
    assert len(parse_alphas("e24:0.01:1")) == 49


def test_parts_are_joined_and_the_grid_sorts_them_once() -> None:
    alphas = parse_alphas("0.4, 0.1:0.4:3,0.1")
    assert alphas == (0.4, 0.1, 0.2, 0.4, 0.1)
    assert Grid(alphas).alphas == (0.1, 0.2, 0.4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0.1,,0.2",
        "1:2",
        "1:2:3:4",
        "2:1:5",
        "0:1:5",
        "1:2:1",
        "1:2:1.5",
        "e24:1",
        "e24:2:1",
        "1:inf:3",
    ],
)
def test_what_is_no_strength_is_named(text: str) -> None:
    with pytest.raises(InputError, match="--alphas"):
        parse_alphas(text)


@pytest.mark.parametrize("alphas", [(0.0,), (-0.1,), (math.nan,), (math.inf,), ()])
def test_strengths_are_finite_and_above_zero(alphas: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="alpha"):
        Grid(alphas)


def test_lines_that_are_the_same_plan_are_one() -> None:
    grid = Grid((0.1,), ablations=(0.0, 0.5, 1.0), ranks=(0, 5), layer_sets=(None, (0, 1)))
    assert grid.lines == (
        Line(0.0, 0),
        Line(0.5, 5),
        Line(1.0, 5),
        Line(0.0, 0, (0, 1)),
        Line(0.5, 5, (0, 1)),
        Line(1.0, 5, (0, 1)),
    )
    assert [line.title for line in grid.lines[2:4]] == ["k = 5, λ = 1", "not ablated, blocks 0-1"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0,4-6,-1", (0, 4, 5, 6, 11)),
        ("-8--1", (4, 5, 6, 7, 8, 9, 10, 11)),
        ("8--2", (8, 9, 10)),
    ],
)
def test_blocks_are_counted_from_either_end(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize("text", ["", "5-3", "-1--8", "1-", "a", "12", "-13", "0-12", "1,1", "1-2-3"])
def test_blocks_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--layers"):
        parse_layers(text, 12)


def test_blocks_are_written_as_runs() -> None:
    assert layers_text((8, 0, 4, 5, 6)) == "0,4-6,8"
