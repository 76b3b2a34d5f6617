"""Call the command line as a user does, and say what a refusal looks like."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from sarsteer_export.cli import main

NOT_AN_ERROR = ("Usage:", "Try ", "warning:")
"""How lines of stderr may begin besides the error and the progress lines `stage: done/total`."""
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A shell that starts the tests in the background makes every child ignore Ctrl-C; this takes it back."""


def sarsteer(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answered(result: Result) -> str:
    """The stdout of a command that did what it was asked."""
    assert result.exit_code == 0, result.stderr
    assert "Error" not in result.stderr
    return str(result.stdout)


def answered_json(result: Result) -> Any:
    """The one JSON object that a command printed on stdout, strictly JSON (no NaN)."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(answered(result), parse_constant=refuse)


def refused(result: Result, *words: str, code: int = 2) -> str:
    """The one message of a command that refused: one line, no traceback, nothing on stdout."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    return one_error(result.stderr, *words)


def one_error(stderr: str, *words: str) -> str:
    """The error in a command's stderr, which holds nothing else but progress, warnings and usage."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(NOT_AN_ERROR)]
    lines = [line for line in lines if not _is_progress(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("Error: ")
    assert "this is a defect" not in lines[0]
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def listing(folder: Path) -> dict[str, str]:
    """Everything under a folder, hidden files included, with content hashes: to see that nothing changed."""
    return {
        path.relative_to(folder).as_posix(): (
            "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
    }


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Python code in a process of its own, given arguments as the command line gets them."""
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    process = start(code, *arguments)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def interrupt(
    process: subprocess.Popen[str], by: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Send Ctrl-C, or another signal, to a process and wait for its end."""
    process.send_signal(by)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _is_progress(line: str) -> bool:
    stage, _, counts = line.rpartition(": ")
    done, slash, total = counts.partition("/")
    return bool(stage and slash and done.isdigit() and total.isdigit())
