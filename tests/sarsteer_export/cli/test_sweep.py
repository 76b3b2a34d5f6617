"""`sweep` on the tiny checkpoint: the folder it writes, and what an interrupted one goes on from."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from calibration.plan import SteeringPlan
from sarsteer_export import Grid, MeasureSettings, SweepSettings, sweep
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.sweeping import sweep as sweeping
from sarsteer_export.sweeping.lock import locked
from tests import tiny_lalm
from tests.sarsteer_export.command_line import (
    answered,
    answered_json,
    interrupt,
    listing,
    one_error,
    refused,
    sarsteer,
    start,
)
from tests.sarsteer_export.conftest import Inputs

Arguments = tuple[str | Path, ...]
ALPHAS, RANKS = "0.5,1,2", "0,2"
ANYTHING = ("--max-asr", "1", "--min-benign", "0.01", "--max-degenerate", "1")
"""Limits that the random answers of the tiny model keep to."""
FILES = ["plan.safetensors", "statistics.safetensors", "sweep.json", "sweep.md", "sweep.svg"]
SLOW = """
import sys, time
from sarsteer_export.sweeping import points
add = points.Unfinished.add
def slow(self, point):
    add(self, point)
    if len(self.points) == 2:
        print("ready", flush=True)
        time.sleep(60)
points.Unfinished.add = slow
from sarsteer_export.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def call(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    folder = tmp_path_factory.mktemp("validation")
    kinds = {
        kind: tiny_lalm.save_requests(folder / kind, count=3, seed=seed)
        for kind, seed in (("harmful", 21), ("benign", 22))
    }
    held_out = ("--eval-harmful", kinds["harmful"], "--eval-benign", kinds["benign"])
    size = ("--alphas", ALPHAS, "--ranks", RANKS, "--max-new-tokens", "3", "--bootstrap", "200")
    return ("sweep", inputs.model, *inputs.data, *held_out, *size)


@pytest.fixture(scope="module")
def swept(call: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole sweep: its folder, and what was printed. Read-only for tests."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    return folder, sarsteer(*call, *ANYTHING, "-o", folder, "--json")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The strengths that were measured, as they are."""
    measured: list[float] = []
    measure = sweeping.measure

    def counting(respondent: Any, plan: SteeringPlan, *arguments: Any, **named: Any) -> Any:
        measured.append(plan.edits[0].strength)
        return measure(respondent, plan, *arguments, **named)

    monkeypatch.setattr(sweeping, "measure", counting)
    return measured


def test_every_setting_is_reported_and_the_folder_is_whole(swept: tuple[Path, Result]) -> None:
    folder, result = swept
    found = answered_json(result)
    assert sorted(listing(folder.parent)) == ["sweep", *(f"sweep/{name}" for name in FILES)]
    assert json.loads((folder / "sweep.json").read_text(encoding="utf-8")) == found
    settings = [(point["rank"], point["lambda"], point["alpha"]) for point in found["points"]]
    assert settings == [(rank, float(rank > 0), alpha) for rank in (0, 2) for alpha in (0.5, 1.0, 2.0)]
    assert found["chosen"]["rank"] == 2
    assert (found["chosen"]["alpha"], found["given_up"]) == (1.0, 0)
    assert "kl" not in found["undefended"]
    assert all(point["figures"]["kl"]["value"] > 0 for point in found["points"])
    assert "Chosen: **k = 2, λ = 1, alpha 1**" in (folder / "sweep.md").read_text(encoding="utf-8")


def test_the_chosen_plan_is_what_calibrate_writes_for_the_setting(
    swept: tuple[Path, Result], inputs: Inputs, tmp_path: Path
) -> None:
    plan = SteeringPlan.load(swept[0] / "plan.safetensors")
    assert plan.digest() == answered_json(swept[1])["chosen"]["plan"]
    steering = ("--alpha", "1", "--lambda", "1", "--rank", "2")
    answered(
        sarsteer("calibrate", inputs.model, *inputs.data, *steering, "-o", tmp_path / "plan.safetensors")
    )
    calibrated = SteeringPlan.load(tmp_path / "plan.safetensors")
    assert [edit.tensors()["vector"].tobytes() for edit in plan.edits] == [
        edit.tensors()["vector"].tobytes() for edit in calibrated.edits
    ]
    provenance = dict(plan.provenance)
    summary, seen = provenance.pop("sweep"), provenance.pop("seen")
    expected = dict(calibrated.provenance)
    assert set(expected.pop("seen")["clips"]) < set(seen["clips"])
    assert provenance == expected
    assert (summary["settings"], summary["usable_alphas"]) == (6, {"first": 0.5, "last": 2.0})


def test_what_a_setting_was_chosen_by_is_no_test_of_it(swept: tuple[Path, Result], call: Arguments) -> None:
    validation = ("--harmful", call[7], "--benign", call[9])
    plan = ("--plan", swept[0] / "plan.safetensors")
    result = sarsteer("evaluate", call[1], *validation, *plan)
    assert result.exit_code == 2
    assert "6 of 6 test requests are clips that calibration saw" in result.stderr


def test_an_interrupted_sweep_goes_on_and_comes_to_the_same(
    call: Arguments, swept: tuple[Path, Result], tmp_path: Path, counted: list[float]
) -> None:
    folder = tmp_path / "sweep"
    process = start(SLOW, *call, *ANYTHING, "-o", folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    beside = listing(tmp_path)
    for resume in ("--resume", "--no-resume"):
        second = refused(sarsteer(*call, *ANYTHING, "-o", folder, resume), "another sweep is at work on it")
        assert f"(process {process.pid})" in second
    assert listing(tmp_path) == beside
    done = interrupt(process)
    assert done.returncode == 130
    one_error(done.stderr, "interrupted; 2 measured settings are kept", ".sweep.unfinished", "--no-resume")
    assert not folder.exists()
    points = tmp_path / ".sweep.unfinished" / "points.jsonl"
    with points.open("a", encoding="utf-8") as opened:  # killed while it wrote a third
        opened.write('{"lambda": 1.0, "ra')
    other = refused(sarsteer(*call, *ANYTHING, "-o", folder, "--max-new-tokens", "2"), "other inputs")
    assert "max_new_tokens" in other
    assert counted == []
    answered(sarsteer(*call, *ANYTHING, "-o", folder))
    assert counted == [2.0, 0.5, 1.0, 2.0]
    assert listing(folder) == listing(swept[0])
    assert not points.parent.exists()


def test_other_limits_choose_again_from_what_is_measured(
    call: Arguments, swept: tuple[Path, Result], tmp_path: Path, counted: list[float]
) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(swept[0], folder)
    result = sarsteer(*call, "-o", folder, "--overwrite", "--max-kl", "0", "--max-asr", "1")
    assert result.exit_code == 6
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: no setting is usable; nearest is ")
    assert "KL, nats per token" in message
    assert sorted(listing(folder)) == FILES[1:]
    assert counted == []
    answered(sarsteer(*call, *ANYTHING, "-o", folder, "--overwrite", "--alphas", "0.5,0.7", "--ranks", "2"))
    assert counted == pytest.approx([0.7], abs=0)
    counted.clear()
    answered(
        sarsteer(
            *call, *ANYTHING, "-o", folder, "--overwrite", "--no-resume", "--alphas", "0.5", "--ranks", "2"
        )
    )
    assert counted == [0.5]


def test_a_finished_sweep_of_other_inputs_is_replaced_only_anew_and_only_by_a_whole_one(
    call: Arguments,
    swept: tuple[Path, Result],
    tmp_path: Path,
    counted: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(swept[0], folder)
    other = (*call, "-o", folder, "--overwrite", "--max-new-tokens", "2", "--alphas", "0.5", "--ranks", "2")
    message = refused(sarsteer(*other), str(folder), "finished sweep of other inputs", "--no-resume")
    assert "(max_new_tokens)" in message
    assert list(listing(tmp_path)) == ["sweep", *(f"sweep/{name}" for name in FILES)]
    assert counted == []
    anew = (*other, "--no-resume", "--max-kl", "0", "--max-asr", "1")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(sweeping, "figures", lambda *_: signal.raise_signal(signal.SIGINT))
        assert sarsteer(*anew).exit_code == 130
    assert listing(folder) == listing(swept[0])
    result = sarsteer(*anew)
    assert result.exit_code == 6
    message = result.stderr.splitlines()[-1]
    assert message.endswith("which holds no plan; what stood there is replaced, its plan too")
    assert sorted(listing(folder)) == FILES[1:]
    assert sarsteer(*anew).stderr.splitlines()[-1].endswith("which holds no plan")  # there was none to lose


def test_a_model_spread_over_devices_is_measured_alike(
    call: Arguments,
    swept: tuple[Path, Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = SweepSettings(
        *call[3:10:2],
        grid=Grid(alphas=(0.5,), ranks=(2,)),
        measure=MeasureSettings(max_new_tokens=3),
        bootstrap=Bootstrap(resamples=200),
        device_map=tiny_lalm.SPLIT,
    )
    (point,) = sweep(call[1], settings, tmp_path / "sweep").to_json()["points"]
    wanted = answered_json(swept[1])["points"][3]
    names = ("rank", "alpha", "figures")
    assert [point[name] for name in names] == [wanted[name] for name in names]
    monkeypatch.setattr("calibration.placement.find_spec", lambda name: None)
    refused(sarsteer(*call, "--device-map", "auto", "-o", tmp_path / "other"), "needs accelerate", code=3)


def test_of_sweeps_that_begin_at_once_one_goes_on(
    call: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other began while this one read its inputs: it is at work, or has ended."""
    folder, kept = tmp_path / "sweep", tmp_path / ".sweep.unfinished"
    fitted = sweeping.fitted
    with ExitStack() as other:

        def begun(*given: Any) -> Any:
            other.enter_context(locked(kept))
            return fitted(*given)

        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(sweeping, "fitted", begun)
            refused(sarsteer(*call, "-o", folder), "another sweep is at work on it")
        assert list(listing(kept)) == ["lock"]

    def ended(*given: Any) -> Any:
        folder.mkdir()
        return fitted(*given)

    monkeypatch.setattr(sweeping, "fitted", ended)
    refused(sarsteer(*call, "-o", folder), "exists; use --overwrite")
    assert list(listing(tmp_path)) == ["sweep"]


def test_a_line_without_hope_is_given_up(call: Arguments, tmp_path: Path, counted: list[float]) -> None:
    # No answer of the tiny model matches this, so no benign request is ever answered.
    result = sarsteer(*call, "-o", tmp_path / "sweep", "--answer-pattern", "^$", "--early-stop", "2")
    assert result.exit_code == 6
    assert counted == [0.5, 1.0, 0.5, 1.0]


def test_requests_that_calibration_hears_are_not_chosen_by(
    call: Arguments, inputs: Inputs, tmp_path: Path
) -> None:
    result = sarsteer(*call, "--eval-harmful", inputs.harmful, "-o", tmp_path / "sweep")
    assert result.exit_code == 2
    assert "6 of 9 test requests are clips that calibration saw" in result.stderr
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--alphas", "0.1:0.2"), ("--alphas", "0.1:0.2")),
        (("--alphas", "0"), ("alpha is 0",)),
        (("--ranks", "two"), ("--ranks", "whole numbers")),
        (("--lambdas", "-1"), ("lambda is -1",)),
        (("--layer-sets", "all;0-99"), ("--layer-sets", "99")),
        (("--max-asr", "2"), ("max_asr is 2",)),
        (("--early-stop", "-1"), ("early_stop is -1",)),
        (("--eval-limit", "0"), ("--eval-limit",)),
    ],
)
def test_bad_options_are_named_before_anything_is_done(
    call: Arguments, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(sarsteer(*call, "-o", tmp_path / "sweep", *options), *words)
    assert listing(tmp_path) == {}


def test_a_damaged_unfinished_sweep_is_named(call: Arguments, tmp_path: Path) -> None:
    kept = tmp_path / ".sweep.unfinished"
    kept.mkdir()
    (kept / "inputs.json").write_text("{", encoding="utf-8")
    refused(sarsteer(*call, "-o", tmp_path / "sweep"), "inputs.json", "damaged", "--no-resume")
