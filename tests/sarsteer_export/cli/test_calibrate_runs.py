"""`calibrate` interrupted and gone on with, in several processes, and spread over devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibration.plan import SteeringPlan
from tests.sarsteer_export.command_line import (
    answered,
    interrupt,
    listing,
    one_error,
    refused,
    sarsteer,
    start,
)
from tests.sarsteer_export.conftest import Inputs

STOPPING = """
import sys, time
from sarsteer_export.cli import command
report = command.Progress.__call__
def slow(self, stage, done, total):
    report(self, stage, done, total)
    if (stage, done) == (sys.argv[1], int(sys.argv[2])):
        print("ready", flush=True)
        time.sleep(60)
command.Progress.__call__ = slow
from sarsteer_export.cli import main
main(sys.argv[3:])
"""
HOLDING = """
import sys, time
from calibration.collection import Collection
take = Collection._take
def hold(self, batch, done):
    take(self, batch, done)
    print("ready", flush=True)
    time.sleep(60)
Collection._take = hold
from sarsteer_export.cli import main
main(sys.argv[1:])
"""
COUNTING = """
import json, sys
from calibration import collection
from calibration.prompt_passes import PromptPasses
heard = {"pair": 0, "single": 0}
for name in heard:
    def counted(self, *inputs, name=name, run=getattr(PromptPasses, name), **options):
        heard[name] += len(inputs[0]["input_ids"])
        return run(self, *inputs, **options)
    setattr(PromptPasses, name, counted)
from sarsteer_export.cli import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(heard), file=sys.stderr)
"""


def vectors(path: Path) -> np.ndarray:
    return np.stack([edit.tensors()["vector"] for edit in SteeringPlan.load(path).edits])


@pytest.fixture(scope="module")
def given(inputs: Inputs) -> tuple[str | Path, ...]:
    return ("calibrate", inputs.model, *inputs.data, "--rank", "2", "--batch-size", "2")


@pytest.fixture(scope="module")
def plan_path(given: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of an undisturbed run in one process."""
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    answered(sarsteer(*given, "-o", path))
    return path


@pytest.mark.parametrize(
    ("stage", "done", "kept", "left"),
    [("harmful", 4, 4, {"pair": 2, "single": 5}), ("steered", 2, 11, {"pair": 0, "single": 0})],
)
def test_an_interrupted_run_is_gone_on_with(
    given: tuple[str | Path, ...],
    plan_path: Path,
    tmp_path: Path,
    stage: str,
    done: int,
    kept: int,
    left: dict[str, int],
) -> None:
    output = tmp_path / "plan.safetensors"
    process = start(STOPPING, stage, str(done), *given, "-o", output)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    stopped = interrupt(process)
    assert stopped.returncode == 130
    unfinished = tmp_path / ".plan.safetensors.unfinished"
    one_error(stopped.stderr, f"{kept} of 11 requests are done and kept in {unfinished}", "--no-resume")
    assert list(listing(tmp_path)) == [unfinished.name]

    refused(sarsteer(*given, "--refusal-prompt", "No.", "-o", output), "of other inputs (refusal_prompt)")

    again = start(COUNTING, *given, "-o", output)
    _, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    assert f"{kept} of 11 requests are done" in stderr
    assert stderr.splitlines()[-1] == str(left).replace("'", '"')
    assert list(listing(tmp_path)) == ["plan.safetensors"]
    # the same batches merged in the same order: the same bits
    np.testing.assert_array_equal(vectors(output), vectors(plan_path))
    assert SteeringPlan.load(output).provenance == SteeringPlan.load(plan_path).provenance


def test_without_resume_it_starts_anew(
    given: tuple[str | Path, ...], plan_path: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / ".plan.safetensors.unfinished"
    unfinished.write_bytes(b"damaged")
    output = tmp_path / "plan.safetensors"
    refused(sarsteer(*given, "-o", output), str(unfinished), "--no-resume")
    answered(sarsteer(*given, "-o", output, "--no-resume"))
    assert list(listing(tmp_path)) == ["plan.safetensors"]
    np.testing.assert_array_equal(vectors(output), vectors(plan_path))


# --------------------------------------------------------------------------------------------------- processes


def run_two(*arguments: str | Path) -> list[subprocess.CompletedProcess[str]]:
    """Two processes as a launcher starts them, each with what it says of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "sarsteer_export", *map(str, arguments)]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    ended = []
    for process in started:
        stdout, stderr = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))
    return ended


def torchrun(*arguments: str | Path) -> subprocess.Popen[str]:
    """Two processes as the launcher itself starts them, of a script or, behind `-m`, a module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_torchrun_go_on_after_an_interruption_and_make_the_plan_of_one(
    given: tuple[str | Path, ...], plan_path: Path, tmp_path: Path
) -> None:
    script, output = tmp_path / "holding.py", tmp_path / "out" / "plan.safetensors"
    script.write_text(HOLDING, encoding="utf-8")
    process = torchrun(script, *given, "-o", output)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2  # one batch of two in each
    stopped = interrupt(process)
    assert stopped.returncode != 0
    assert stopped.stderr.count("2 of 11 requests are done and kept") == 1
    unfinished = f".{output.name}.unfinished"
    assert list(listing(output.parent)) == [unfinished, f"{unfinished}.1"]

    again = torchrun("-m", "sarsteer_export", *given, "-o", output)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    assert "4 of 11 requests are done" in stderr
    assert stdout.count(f"-> {output}") == 1
    assert [line for line in stderr.splitlines() if "/" in line][-1] == "steered: 11/11"
    assert list(listing(output.parent)) == [output.name]
    # The same batches, their float64 sums in another order: at most one rounding to float32 of values below 2.
    np.testing.assert_allclose(vectors(output), vectors(plan_path), rtol=0, atol=2.4e-7)
    assert SteeringPlan.load(output).provenance == SteeringPlan.load(plan_path).provenance


def test_what_fails_in_both_processes_is_said_once(inputs: Inputs, tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    output = tmp_path / "plan.safetensors"
    ended = run_two("calibrate", inputs.model, "--harmful", missing, "--benign", inputs.benign, "-o", output)
    assert [process.returncode for process in ended] == [2, 2]
    one_error("".join(process.stderr for process in ended), str(missing))
    assert listing(tmp_path) == {}


def test_processes_that_no_launcher_started_are_refused(
    given: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused(sarsteer(*given, "-o", tmp_path / "plan"), "WORLD_SIZE is 'two'")


def test_a_device_map_loads_and_gives_the_same_plan(
    given: tuple[str | Path, ...], plan_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan.safetensors"
    answered(sarsteer(*given, "-o", output, "--device-map", "auto"))
    np.testing.assert_array_equal(vectors(output), vectors(plan_path))
