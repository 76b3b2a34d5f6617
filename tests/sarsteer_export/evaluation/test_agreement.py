"""Runtimes that differ are named prompt by prompt."""

from __future__ import annotations

from pathlib import Path

from calibration.requests import SpokenRequest
from sarsteer_export.evaluation.agreement import agreement
from sarsteer_export.evaluation.measure import Measured, Output
from sarsteer_export.judges.judge import Behaviour

REQUESTS = {
    "harmful": [
        SpokenRequest(Path("a.wav"), "listen", "steal"),
        SpokenRequest(Path("b.wav"), "listen", None),
    ],
    "benign": [SpokenRequest(Path("c.wav"), "listen", "bake")],
}


def said(*texts: tuple[str, Behaviour]) -> Measured:
    first, second, third = (Output(*text) for text in texts)
    return Measured({"harmful": (first, second), "benign": (third,)})


def test_prompts_that_differ_are_listed_with_both_outputs() -> None:
    eager = said(("no", Behaviour.REFUSAL), ("sure", Behaviour.ANSWER), ("flour", Behaviour.ANSWER))
    engine = said(("no", Behaviour.REFUSAL), ("surely", Behaviour.ANSWER), ("I cannot", Behaviour.REFUSAL))
    found = agreement("steered", REQUESTS, [eager], [engine])
    assert (found.total, found.identical, found.same_verdict) == (3, 1, 2)
    assert [(entry["requests"], entry["index"], entry["transcript"]) for entry in found.different] == [
        ("harmful", 1, None),
        ("benign", 0, "bake"),
    ]
    assert found.different[1]["eager"] == {"output": "flour", "verdict": "answer"}
    assert found.different[1]["engine"] == {"output": "I cannot", "verdict": "refusal"}


def test_random_controls_are_compared_each_with_its_own() -> None:
    one = said(("a", Behaviour.ANSWER), ("b", Behaviour.ANSWER), ("c", Behaviour.ANSWER))
    two = said(("d", Behaviour.ANSWER), ("e", Behaviour.ANSWER), ("f", Behaviour.ANSWER))
    assert agreement("random", REQUESTS, [one, two], [one, two]).identical == 6
    crossed = agreement("random", REQUESTS, [one, two], [two, one])
    assert crossed.identical == 0
    assert {entry["run"] for entry in crossed.different} == {0, 1}
