"""Positions as a plan writes them, and which tokens they select in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import InputError
from calibration.positions import PositionKind, Positions
from calibration.token_positions import selected

WRITTEN = {
    "last": Positions.LAST,
    "all": Positions.ALL,
    "prompt": Positions.PROMPT,
    "generated": Positions.GENERATED,
    "first:4": Positions.first(4),
    "range:2:5": Positions.range(2, 5),
    "range:3:": Positions.range(3),
}
REFUSED = [
    "",
    "LAST",
    "first",
    "first:",
    "first:-1",
    "first:04",
    "range:",
    "range:1",
    "range:a:b",
    "range::2",
    3,
    None,
]


@pytest.mark.parametrize(("text", "positions"), WRITTEN.items(), ids=WRITTEN)
def test_what_a_plan_writes_is_read_back(text: str, positions: Positions) -> None:
    assert Positions.parse(text) == positions
    assert positions.value == text


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_and_the_grammar_named(text: object) -> None:
    with pytest.raises(InputError, match=r"edits\.0\.positions is .*; known are last, all, .*range:A:B"):
        Positions.parse(text, "edits.0.positions")


@pytest.mark.parametrize("text", ["first:0", "range:4:4", "range:5:2"])
def test_bounds_that_select_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"positions '{text}' select no"):
        Positions.parse(text)


def test_bounds_belong_to_kinds_that_have_them() -> None:
    with pytest.raises(InputError, match="'last' take no bounds"):
        Positions(PositionKind.LAST, 1, 2)


@given(st.one_of(st.integers(1, 10**6).map(Positions.first), st.integers(0, 99).map(Positions.range)))
def test_positions_survive_being_written(positions: Positions) -> None:
    assert Positions.parse(positions.value) == positions


def asked(lengths: list[int]) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(lengths)


def never() -> torch.Tensor:
    raise AssertionError("positions that do not depend on prompts ask for none")


MASK = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
"""Six columns: a row padded on the left and one padded on the right, four tokens each."""
PREFILL = {
    Positions.ALL: [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    Positions.LAST: [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]],
    Positions.PROMPT: [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]],
    Positions.GENERATED: [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]],
    Positions.first(1): [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]],
    Positions.first(2): [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]],
    Positions.range(1, 3): [[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]],
    Positions.range(2): [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]],
}


@pytest.mark.parametrize(("positions", "expected"), PREFILL.items(), ids=[kind.value for kind in PREFILL])
def test_positions_count_attended_tokens_of_each_row(positions: Positions, expected: list[list[int]]) -> None:
    """The first row's prompt has three tokens, the second one's four."""
    lengths = asked([3, 4]) if positions.needs_prompt_length else never
    chosen = selected(positions, torch.tensor(MASK), 6, lengths)
    assert chosen.long().tolist() == expected


@pytest.mark.parametrize(
    ("positions", "expected"), [(kind, rows) for kind, rows in PREFILL.items() if kind != Positions.LAST]
)
def test_what_is_selected_does_not_depend_on_how_tokens_are_cut_into_passes(
    positions: Positions, expected: list[list[int]]
) -> None:
    """Unlike the last position, which is that of each pass."""
    parts = []
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        mask = torch.tensor(MASK)[:, :stop]
        parts.append(selected(positions, mask, stop - start, asked([3, 4])))
    assert torch.cat(parts, dim=1).long().tolist() == expected
