"""The account that a build gives of what its bundle says."""

from __future__ import annotations

from sarsteer_export.behaviour import BehaviourReport, BehaviourRow


def test_the_table_is_in_percent_and_says_how_many_agree() -> None:
    row = BehaviourRow("steered", "eager", "harmful", count=8, refusals=6, answers=1, degenerate=1)
    table = BehaviourReport((row,), {"steered": 0.875}, ()).table().splitlines()
    assert table[1].split() == ["harmful", "steered", "eager", "75.0%", "12.5%", "12.5%", "8"]
    assert table[2] == "eager and engine say the same, steered: 87.5%"
