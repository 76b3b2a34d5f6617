"""Ctrl-C, or a termination, in the middle: one message, exit code 130, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sarsteer_export.command_line import interrupt, listing, one_error, start
from tests.sarsteer_export.conftest import Inputs

COMMAND = "import sys; from sarsteer_export.cli import main; main(sys.argv[1:])"
SLOW_CALIBRATION = """
import sys, time
from sarsteer_export.cli import command
report = command.Progress.__call__
def slow(self, stage, done, total):
    report(self, stage, done, total)
    print("ready", flush=True)
    time.sleep(60)
command.Progress.__call__ = slow
from sarsteer_export.cli import main
main(sys.argv[1:])
"""


def wait_for(process: subprocess.Popen[str], found: Callable[[], object]) -> None:
    """Wait until something is there, or the process has ended too early."""
    while not found():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def interrupted(process: subprocess.Popen[str], place: Path, by: signal.Signals = signal.SIGINT) -> None:
    done = interrupt(process, by)
    assert done.returncode == 130, done.stderr
    one_error(done.stderr, "interrupted", "nothing was written")
    assert listing(place) == {}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_calibrate(inputs: Inputs, tmp_path: Path, by: signal.Signals) -> None:
    """What was found is kept, see `test_calibrate_runs.py`; the folders it needs are made."""
    output = tmp_path / "new" / "plan.safetensors"
    process = start(SLOW_CALIBRATION, "calibrate", inputs.model, *inputs.data, "-o", output)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    done = interrupt(process, by)
    assert done.returncode == 130, done.stderr
    one_error(done.stderr, "interrupted; 2 of 11 requests are done and kept in")
    assert list(listing(tmp_path)) == ["new", "new/.plan.safetensors.unfinished"]


def test_export(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "new" / "onnx"
    process = start(COMMAND, "export", inputs.model, "-o", output)
    wait_for(process, lambda: list(tmp_path.glob("new/.onnx.*/new")))
    interrupted(process, tmp_path)


@pytest.mark.parametrize("seen", ["steering/plan.safetensors", "onnx/audio_encoder.onnx"])
def test_build(inputs: Inputs, tmp_path: Path, seen: str) -> None:
    output = tmp_path / "new" / "bundle"
    process = start(COMMAND, "build", inputs.model, *inputs.data, "-o", output)
    wait_for(process, lambda: list(tmp_path.glob(f"new/.bundle.*/new/{seen}")))
    interrupted(process, tmp_path)


SLOW_IMPORT = """
import sys, time
import sarsteer_export.cli as cli
def slow(name):
    print("ready", flush=True)
    time.sleep(60)
cli.import_module = slow
cli.main(sys.argv[1:])
"""


def test_while_the_command_is_still_being_imported(tmp_path: Path) -> None:
    process = start(SLOW_IMPORT, "calibrate", "model")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    interrupted(process, tmp_path)


SWALLOWED = """
import os, signal, sys
from sarsteer_export.cli import command
report = command.Progress.__call__
def swallowing(self, stage, done, total):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10**6))
    except KeyboardInterrupt:
        pass  # as some libraries do while they are imported
    report(self, stage, done, total)
command.Progress.__call__ = swallowing
from sarsteer_export.cli import main
main(sys.argv[1:])
"""
REWRAPPED = SWALLOWED.replace("pass  #", "raise ImportError('initialization failed')  #")


@pytest.mark.parametrize("code", [SWALLOWED, REWRAPPED], ids=["swallowed", "rewrapped"])
def test_an_interrupt_that_a_library_swallowed_or_rewrapped_still_counts(
    code: str, inputs: Inputs, tmp_path: Path
) -> None:
    process = start(code, "calibrate", inputs.model, *inputs.data, "-o", tmp_path / "plan.safetensors")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    one_error(stderr, "interrupted")
    assert list(listing(tmp_path)) in ([], [".plan.safetensors.unfinished"])
