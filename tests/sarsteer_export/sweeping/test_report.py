"""What a sweep reports: the Pareto front, the page, and the picture."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

from sarsteer_export.sweeping.grid import Line
from sarsteer_export.sweeping.limits import Limits
from sarsteer_export.sweeping.pareto import BENIGN_ANSWERED, pareto_front
from sarsteer_export.sweeping.picture import LIGHT, STAND_INS, sweep_svg
from sarsteer_export.sweeping.points import Point
from sarsteer_export.sweeping.written import sweep_json
from tests.sarsteer_export.sweeping.points import point, sweep_of

PLAIN, FIVE = Line(0.0, 0), Line(1.0, 5)
POINTS = (
    point(PLAIN, 0.1, attack_success=0.5, kl=0.1),
    point(PLAIN, 0.2, attack_success=0.0, kl=0.2),
    point(PLAIN, 0.4, attack_success=0.0, kl=0.3),
    point(FIVE, 0.1, attack_success=0.6, kl=0.05),
    point(FIVE, 0.2, attack_success=0.0, kl=0.25),
    point(FIVE, 0.4, attack_success=0.0, kl=math.inf, benign_answered=0.2),
)
NONE_USABLE = Limits(max_asr=0.0, max_kl=0.1)


def names(points: list[Point]) -> list[tuple[int, float]]:
    return [(point.line.rank, point.alpha) for point in points]


def test_no_point_of_the_front_is_beaten_and_every_other_is() -> None:
    assert names(pareto_front(POINTS, "kl")) == [(5, 0.1), (0, 0.1), (0, 0.2)]
    # Benign requests are all answered at four of them, with no attack success at three.
    assert names(pareto_front(POINTS, BENIGN_ANSWERED)) == [(0, 0.2), (0, 0.4), (5, 0.2)]


def test_the_page_names_the_choice_with_its_figures_and_marks_what_is_usable() -> None:
    found = sweep_of(POINTS, Limits())
    page = found.markdown()
    assert "Chosen: **k = 5, λ = 1, alpha 0.2**" in page
    assert "| 0.2 | **0.00 / 0.00 / 1.00** | **0.00 / 0.00 / 1.00** |" in page
    assert "| 0.4 | **0.00 / 0.00 / 1.00** | 0.00 / 0.00 / 0.20 |" in page
    assert "| not ablated | 0.2 to 0.4 | 2.00 | 0.2 |" in page
    assert any("not ablated: a wider run than the chosen one (x 2.00)" in note for note in found.notes())


def test_without_a_usable_setting_the_nearest_is_named_with_what_it_breaks() -> None:
    found = sweep_of(POINTS, NONE_USABLE)
    assert found.chosen is None
    assert found.nothing_usable() == (
        "no setting is usable; nearest is not ablated, alpha 0.2: KL, nats per token 0.2, limit 0.1"
    )
    assert "no setting is usable" in found.table()


def test_alphas_that_were_given_up_are_counted_and_shown_as_not_measured() -> None:
    found = sweep_of(POINTS[:-1], Limits())
    assert found.given_up == 1
    assert "| 0.4 | **0.00 / 0.00 / 1.00** | – |" in found.markdown()
    assert any(note.startswith("1 settings were not measured") for note in found.notes())


def test_the_json_has_null_for_what_is_not_finite() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(sweep_json(sweep_of(POINTS, Limits())), parse_constant=refuse)
    assert content["points"][-1]["figures"]["kl"]["value"] is None
    assert [point["pareto"] for point in content["points"]] == [True, True, False, True, False, False]
    assert [point["usable"] for point in content["points"]] == [False, True, True, False, True, False]
    assert content["chosen"]["alpha"] == 0.2
    read_back = [Point.from_json(point) for point in content["points"]]
    assert read_back[:-1] == list(POINTS[:-1])
    assert math.isnan(read_back[-1].figures["kl"].value)


def test_the_picture_names_every_line_and_the_choice_in_both_schemes() -> None:
    svg = sweep_svg(sweep_of(POINTS, Limits()))
    ElementTree.fromstring(svg)  # noqa: S314 - our own
    for text in (
        "not ablated",
        "k = 5, λ = 1",
        "Pareto front",
        "chosen: k = 5, λ = 1, alpha 0.2",
        "attack success",
    ):
        assert f">{text}<" in svg
    assert not [stand_in for stand_in in STAND_INS if stand_in in svg]
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert {"line-1", "line-2", "usable", "rate-1", "rate-2", "rate-3"} <= used
    assert used <= {*LIGHT, "rule", "fail"}
    assert "prefers-color-scheme: dark" in svg
    assert svg == sweep_svg(sweep_of(POINTS, Limits()))


def test_a_picture_of_nothing_usable_and_of_many_lines_is_drawn_too() -> None:
    nothing = sweep_svg(sweep_of(POINTS, NONE_USABLE))
    assert "Nothing is usable." in nothing
    assert "chosen: " not in nothing
    many = [point(Line(1.0, rank), 0.1, kl=0.0) for rank in range(1, 11)]
    assert ">k = 10, λ = 1<" in sweep_svg(sweep_of(many, Limits(max_asr=1.0)))
