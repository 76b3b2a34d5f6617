"""Several plans in one: nothing meets by accident."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from calibration.combine import CombineRule, combine_plans
from calibration.errors import InputError
from calibration.plan import Add, Edit, Positions, Site, SteeringPlan


def add(layer: int, site: Site = Site.BLOCK_OUTPUT, positions: Positions = Positions.LAST) -> Add:
    return Add(layer, np.arange(4, dtype=np.float32) + layer, site=site, positions=positions)


def plan(*edits: Edit, **provenance: str) -> SteeringPlan:
    return SteeringPlan(4, 3, edits, provenance)


def test_edits_keep_the_order_of_the_plans() -> None:
    one, other = plan(add(1), add(0)), plan(add(2), add(2, Site.FINAL_NORM_OUTPUT))
    combined = combine_plans([one, other])
    assert combined.edits == one.edits + other.edits
    assert combined.provenance == {"combined": {"rule": "disjoint", "plans": [one.digest(), other.digest()]}}


def test_one_plan_is_left_as_it_is() -> None:
    single = plan(add(1), model_fingerprint="abc")
    assert combine_plans([single]) is single


@pytest.mark.parametrize(
    "other",
    [add(1), add(2, Site.BLOCK_INPUT), add(1, positions=Positions.ALL)],
    ids=["same site", "input of the next block", "other positions"],
)
def test_two_plans_on_one_tensor_are_refused_unless_a_rule_is_named(other: Edit) -> None:
    plans = [plan(add(0)), plan(add(1)), plan(other)]
    with pytest.raises(
        InputError, match=r"plans 2 and 3 both edit block_\w+ of block \d; .*--combine sequence"
    ):
        combine_plans(plans)
    assert [edit.layer for edit in combine_plans(plans, CombineRule.SEQUENCE).edits] == [0, 1, other.layer]


def test_edits_of_one_plan_may_meet() -> None:
    combine_plans([plan(add(1), add(1)), plan(add(0))])


def test_plans_for_different_decoders_are_refused() -> None:
    with pytest.raises(InputError, match="plan 2 is for 3 blocks of width 5; the first is for 3 of width 4"):
        combine_plans([plan(add(0)), SteeringPlan(5, 3, (Add(0, np.ones(5, dtype=np.float32)),))])
    with pytest.raises(InputError, match="different models: their fingerprints are aa, bb"):
        combine_plans([plan(add(0), model_fingerprint="aa"), plan(add(1), model_fingerprint="bb")])
    with pytest.raises(InputError, match="no plan"):
        combine_plans([])


def test_a_known_model_stays_known() -> None:
    combined = combine_plans([plan(add(0), model_fingerprint="aa"), plan(add(1))])
    assert combined.model_fingerprint == "aa"
    assert combined.digest() == dataclasses.replace(combined, provenance={}).digest()
