"""The report: one verdict, every failure named, JSON that any reader takes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from engines.parity import CaseResult, Control, Effect, Measurement
from engines.report import ParityReport, Verdict
from tests.engines.test_parity import LIMITS, compare

GOOD = Measurement("left, edited", "logits cosine", 0.99999, 0.9999, at_least=True)
BAD = Measurement("left, edited", "logits KL", 0.25, 0.001, at_least=False, detail="somewhere")
EFFECT = Effect(step=0, row=0, tensor="logits", cosine=1.0, ratio=1.0, relative_norm=0.1)


def report(*cases: CaseResult, components: tuple[Measurement, ...] = ()) -> ParityReport:
    return ParityReport("onnxruntime-cpu", "float32", LIMITS, components, cases, {"plan_sha256": "abc"})


def case(*measurements: Measurement, caught: bool = True) -> CaseResult:
    control = Control("wrong sign", ("logits effect cosine",) if caught else ())
    return CaseResult("left", measurements, (EFFECT,), (control,), (1e-7,))


def test_a_report_passes_when_everything_does() -> None:
    good = report(case(GOOD), components=(GOOD,))
    assert good.verdict is Verdict.PASSED
    assert good.failures() == []


def test_notes_are_told_and_judge_nothing() -> None:
    noted = dataclasses.replace(report(case(GOOD)), notes=("greedy rollouts, steered: 0 of 4 the same",))
    assert noted.verdict is Verdict.PASSED
    assert noted.to_json()["notes"] == ["greedy rollouts, steered: 0 of 4 the same"]
    assert "greedy rollouts, steered: 0 of 4 the same\nverdict: passed" in noted.table()


def test_without_cases_nothing_was_executed_and_nothing_is_passed() -> None:
    empty = report(components=(GOOD,))
    assert empty.verdict is Verdict.NOT_EXECUTED
    assert empty.to_json()["verdict"] == "built, not executed"
    assert empty.table().endswith("verdict: built, not executed")


@pytest.mark.parametrize(
    "failing",
    [
        report(case(GOOD, BAD)),
        report(case(GOOD), case(BAD)),
        report(case(GOOD), components=(BAD,)),
        report(case(GOOD, caught=False)),
    ],
    ids=["a figure", "a figure of the second case", "a component", "a control"],
)
def test_one_failure_anywhere_fails_the_report_and_is_named(failing: ParityReport) -> None:
    assert failing.verdict is Verdict.FAILED
    (line,) = failing.failures()
    assert line in (
        "left, edited: logits KL is 0.25, limit 0.001 somewhere",
        "left: the control engine with wrong sign was not caught",
    )
    assert failing.to_json()["failures"] == [line]
    assert "FAILED" in failing.table()


def test_the_table_shows_the_worst_of_each_figure() -> None:
    worse = dataclasses.replace(GOOD, case="right, edited", value=0.99991)
    rows = report(case(GOOD), case(worse)).table().splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["edited", "logits", "cosine", "1", ">=", "0.9999", "ok"],
        ["control", "wrong", "sign", "2/2", "caught", "in", "all", "ok"],
        ["verdict:", "passed"],
    ]
    nan = dataclasses.replace(GOOD, case="right, edited", value=math.nan)
    assert "nan" in report(case(GOOD), case(nan)).table()


def test_json_is_strict_whatever_the_figures() -> None:
    broken = dataclasses.replace(GOOD, value=math.nan), dataclasses.replace(BAD, value=math.inf)
    effect = dataclasses.replace(EFFECT, ratio=math.inf)
    result = CaseResult("left", broken, (effect,), (), (math.nan, math.inf))
    content = json.loads(json.dumps(report(result).to_json(), allow_nan=False))
    assert [item["value"] for item in content["cases"][0]["measurements"]] == ["nan", "inf"]
    assert content["cases"][0]["effects"][0]["ratio"] == "inf"
    assert content["cases"][0]["logits_difference"] == ["nan", "inf"]


def test_json_holds_every_figure_with_its_limit_and_every_control() -> None:
    result = compare()
    content = report(result, components=(GOOD,)).to_json()
    assert content["verdict"] == "passed"
    assert content["components"] == [{**dataclasses.asdict(GOOD), "passed": True}]
    (written,) = content["cases"]
    assert len(written["measurements"]) == len(result.measurements)
    assert [(item["what"], item["limit"]) for item in written["measurements"]] == [
        (item.what, item.limit) for item in result.measurements
    ]
    assert [control["name"] for control in written["controls"]] == ["unsteered", "wrong sign"]
    assert all(control["caught"] and control["caught_by"] for control in written["controls"])
    assert content["limits_source"] == LIMITS.source
    assert content["context"] == {"plan_sha256": "abc"}
