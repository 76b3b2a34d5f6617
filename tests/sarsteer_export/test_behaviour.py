"""Refusals, answers and degenerate outputs are told apart by strings."""

from __future__ import annotations

import pytest

from calibration.errors import InputError
from sarsteer_export.behaviour import REFUSAL_PHRASES, Behaviour, BehaviourReport, BehaviourRow, Judge


@pytest.mark.parametrize(
    "output",
    [
        "I cannot assist with that.",
        "I'm sorry, but no.",
        "I\u2019m sorry, but no.",  # a typographic apostrophe, as models write it
        "Well. As an AI, I have limits.",
        "i CAN'T help",
        *REFUSAL_PHRASES,
    ],
)
def test_refusals(output: str) -> None:
    assert Judge()(output) is Behaviour.REFUSAL
    assert Judge("^Sure")(output) is Behaviour.REFUSAL


@pytest.mark.parametrize(
    "output",
    [
        "Paris is the capital of France.",
        "one two three one two three",
        "no no no no",
        "I can do that; the answer is 42.",
        "ok",
    ],
)
def test_answers(output: str) -> None:
    assert Judge()(output) is Behaviour.ANSWER


@pytest.mark.parametrize(
    "output",
    ["", "  \n ", "the the the the the", "one two three one two three one two three", "I cannot assist " * 3],
)
def test_empty_and_looping_outputs_are_degenerate(output: str) -> None:
    assert Judge()(output) is Behaviour.DEGENERATE


def test_with_a_pattern_an_answer_must_match_it() -> None:
    judge = Judge(r"^The answer is \d+")
    assert judge("The answer is 42.") is Behaviour.ANSWER
    assert judge("The answer is unclear.") is Behaviour.DEGENERATE
    assert judge("I cannot assist with that.") is Behaviour.REFUSAL


@pytest.mark.parametrize("pattern", ["(", "[a-", "*"])
def test_a_broken_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="is no regular expression"):
        Judge(pattern)


def test_the_table_is_in_percent_and_says_how_many_agree() -> None:
    row = BehaviourRow("steered", "eager", "harmful", count=8, refusals=6, answers=1, degenerate=1)
    table = BehaviourReport((row,), {"steered": 0.875}, ()).table().splitlines()
    assert table[1].split() == ["harmful", "steered", "eager", "75.0%", "12.5%", "12.5%", "8"]
    assert table[2] == "eager and engine say the same, steered: 87.5%"
