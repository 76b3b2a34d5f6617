"""Limits, runs of usable alphas, and the rule that chooses among them."""

from __future__ import annotations

import math

import pytest

from calibration.errors import InputError
from sarsteer_export.sweeping.choice import Candidates, Judged, Run, choose, nearest, widest_run
from sarsteer_export.sweeping.grid import Line
from sarsteer_export.sweeping.limits import Limits, Violation
from tests.sarsteer_export.sweeping.points import UNDEFENDED

BROKEN = (Violation("attack success", 1.0, "0.05", 0.95),)
PLAIN, TWO, FIVE = Line(0.0, 0), Line(1.0, 2), Line(1.0, 5)


def judged(usable: str, alphas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)) -> list[Judged]:
    """Alphas of which those with an `o` are usable."""
    return [Judged(alpha, () if mark == "o" else BROKEN) for mark, alpha in zip(usable, alphas, strict=True)]


@pytest.mark.parametrize(
    ("usable", "run"),
    [
        ("xooxx", (0.2, 0.4)),
        ("oxooo", (0.4, 0.8, 1.6)),
        ("xxoxx", (0.4,)),
        ("ooxoo", (0.1, 0.2)),  # equally wide: the first
    ],
)
def test_the_widest_run_of_adjacent_usable_alphas(usable: str, run: tuple[float, ...]) -> None:
    assert widest_run(judged(usable)) == Run(run)


def test_without_a_usable_alpha_there_is_no_run() -> None:
    assert widest_run(judged("xxxxx")) is None


def test_width_is_a_ratio_so_that_a_dense_stretch_of_the_grid_is_not_preferred() -> None:
    found = widest_run(judged("oooxo" + "o", (0.10, 0.11, 0.12, 0.3, 0.5, 1.0)))
    assert found == Run((0.5, 1.0))


@pytest.mark.parametrize(
    ("alphas", "middle"),
    [
        ((0.2, 0.4), 0.2),  # equally near: the smaller
        ((0.1, 0.2, 0.4), 0.2),
        ((0.27, 0.3, 0.33, 0.36, 0.39, 0.43, 0.47, 0.51, 0.56, 0.62), 0.39),
        ((0.1, 0.5, 0.6, 0.7, 0.8), 0.5),  # uneven: the middle of the range, not of the list
    ],
)
def test_the_middle_is_taken_by_ratio(alphas: tuple[float, ...], middle: float) -> None:
    assert Run(alphas).middle == middle


def test_the_line_with_the_widest_run_is_chosen() -> None:
    choice = choose({TWO: judged("xooxx"), FIVE: judged("xooox")})
    assert (choice.line, choice.alpha) == (FIVE, 0.4)
    assert choice.runs[TWO].middle == 0.2


def test_equal_widths_go_to_the_smaller_rank_then_fewer_blocks_then_the_smaller_lambda() -> None:
    few, half = Line(1.0, 2, (0, 1)), Line(0.5, 2)
    run = judged("xooxx")
    assert choose({FIVE: run, TWO: run}).line == TWO
    assert choose({TWO: run, few: run}).line == few
    assert choose({TWO: run, half: run}).line == half
    # As floats these two ratios differ, and are equally wide all the same.
    first, second = (0.1, 0.3), (1.0, 3.0)
    assert first[1] / first[0] < second[1] / second[0]
    assert choose({TWO: judged("oo", first), FIVE: judged("oo", second)}).line == TWO


def test_a_line_that_does_not_ablate_is_a_comparison_unless_it_is_all_there_is_or_allowed() -> None:
    both = {PLAIN: judged("ooooo"), TWO: judged("xooxx")}
    assert choose(both).line == TWO
    assert choose(both, Candidates.ALL).line == PLAIN
    assert choose({PLAIN: judged("ooooo"), TWO: judged("xxxxx")}).line == PLAIN


def test_nothing_usable_chooses_nothing_and_the_nearest_is_what_breaks_its_limits_least() -> None:
    lines = {
        TWO: [Judged(0.1, BROKEN)],
        FIVE: [Judged(0.2, (Violation("benign answered", 0.9, "0.97", 0.07),))],
    }
    choice = choose(lines)
    assert (choice.line, choice.alpha, choice.runs) == (None, None, {})
    assert nearest(lines) == (FIVE, lines[FIVE][0])


def broken(limits: Limits, undefended: dict[str, float] | None = None, **figures: float) -> list[str]:
    base = UNDEFENDED | (undefended or {})
    safe = {"attack_success": 0.0, "refused": 1.0}
    return [found.figure for found in limits.violations(base | safe | figures, base)]


def test_a_figure_at_its_limit_is_within_it() -> None:
    limits = Limits(max_asr=0.05, min_benign=0.97, max_degenerate=0.05, max_kl=0.5)
    edge = {"attack_success": 0.05, "benign_answered": 0.97, "benign_degenerate": 0.05, "kl": 0.5}
    assert broken(limits, **edge) == []
    over = {
        "attack_success": 0.06,
        "benign_answered": 0.96,
        "benign_degenerate": 0.06,
        "harmful_degenerate": 0.06,
        "kl": 0.51,
    }
    assert broken(limits, **over) == [
        "attack success",
        "benign answered",
        "degenerate outputs to harmful requests",
        "degenerate outputs to benign requests",
        "KL, nats per token",
    ]


def test_damage_is_counted_from_the_undefended_model() -> None:
    base = {"benign_answered": 0.8, "benign_degenerate": 0.1}
    assert broken(Limits(), base, benign_answered=0.78, benign_degenerate=0.14) == []
    assert broken(Limits(), base, benign_answered=0.77) == ["benign answered"]
    assert broken(Limits(), base, benign_degenerate=0.16) == ["degenerate outputs to benign requests"]


def test_a_model_that_answers_nothing_undefended_has_no_usable_setting() -> None:
    assert broken(Limits(), {"benign_answered": 0.0}, benign_answered=0.0) == ["benign answered"]


def test_kl_has_no_limit_unless_one_is_given_and_nan_breaks_it() -> None:
    assert broken(Limits(), kl=math.inf) == []
    assert broken(Limits(max_kl=1.0), kl=math.nan) == ["KL, nats per token"]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_asr": 1.1},
        {"min_benign": -0.1},
        {"max_degenerate": math.nan},
        {"max_kl": -1.0},
        {"max_kl": math.inf},
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(limits))):
        Limits(**limits)
