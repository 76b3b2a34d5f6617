"""What every command shares: `--config`, `--json`, `--debug`, and errors nobody foresaw."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from calibration.plan import Add, SteeringPlan
from sarsteer_export.bundle.manifest import PLAN
from sarsteer_export.cli import COMMANDS, LazyGroup, main
from sarsteer_export.cli.command import WAIT_SECONDS
from tests.sarsteer_export.command_line import answered, answered_json, refused, run_python, sarsteer
from tests.sarsteer_export.conftest import Inputs

DATA = ("--harmful", "none.jsonl", "--benign", "none.jsonl")
WRITING = [
    ("build", "none", *DATA, "-o", "out"),
    ("export", "none", "-o", "out"),
    ("convert", "none.gguf", "-o", "out.safetensors"),
    ("patch", "none.onnx", "--plan", "none.safetensors", "-o", "out.onnx"),
    ("unpatch", "none.onnx", "-o", "out.onnx"),
    ("build-engine", "none.onnx", "--engine", "onnxruntime-cuda", "-o", "out"),
    ("refit", "none.onnx", "--plan", "none.safetensors"),
    ("evaluate", "none", *DATA),
    ("sweep", "none", *DATA, "--eval-harmful", "none.jsonl", "--eval-benign", "none.jsonl", "-o", "out"),
]


def test_all_commands_that_write_are_known_here() -> None:
    assert isinstance(main, LazyGroup)
    commands = {name: main.get_command(click.Context(main), name) for name in COMMANDS}
    writing = {
        name
        for name, command in commands.items()
        if command is not None and any(parameter.name == "output" for parameter in command.params)
    }
    assert writing == {call[0] for call in WRITING} | {"calibrate"}


@pytest.mark.parametrize("call", WRITING, ids=lambda call: str(call[0]))
def test_only_calibrate_is_shared_among_processes(
    call: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slept: list[float] = []
    monkeypatch.setattr("sarsteer_export.cli.command.time.sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        refused(sarsteer(*call), f"{call[0]} runs in one process, and WORLD_SIZE is 2", "calibrate")
    assert slept == [WAIT_SECONDS]  # process 0 has spoken by then, and the launcher has ended the other
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "WORLD_SIZE" not in refused(sarsteer(*call))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "options.toml"


def test_config_gives_options_by_their_long_names(inputs: Inputs, config: Path, tmp_path: Path) -> None:
    lines = [
        f"harmful = {str(inputs.harmful)!r}",
        f"benign = {str(inputs.benign)!r}",
        "alpha = 0.25",
        "lambda = 0.5",
        "rank = 3",
        "layers = '0,-1'",
        "json = true",
    ]
    config.write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "plan.safetensors"
    found = answered_json(sarsteer("calibrate", inputs.model, "--config", config, "-o", output))
    assert found["provenance"]["alpha"] == 0.25
    assert found["provenance"]["lambda"] == 0.5
    assert found["provenance"]["rank"] == 3
    assert [edit.layer for edit in SteeringPlan.load(output).edits] == [0, 2]


def test_the_command_line_wins_over_the_config(inputs: Inputs, config: Path, tmp_path: Path) -> None:
    config.write_text("alpha = 0.25\nrank = 3\n", encoding="utf-8")
    output = tmp_path / "plan.safetensors"
    given = (
        "calibrate",
        inputs.model,
        *inputs.data,
        "-o",
        output,
        "--alpha",
        "0.75",
        "--config",
        config,
        "--json",
    )
    found = answered_json(sarsteer(*given))
    assert (found["provenance"]["alpha"], found["provenance"]["rank"]) == (0.75, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alhpa = 1.0\n", ["alhpa", "alpha"]),
        ("[calibrate]\nalpha = 1.0\n", ["calibrate"]),
        ("alpha: 1.0\n", ["not TOML"]),
        ("alpha = 'strong'\n", ["strong"]),
        ("model = 'x'\n", ["model"]),
    ],
)
def test_a_wrong_config_is_refused(
    inputs: Inputs, config: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    config.write_text(text, encoding="utf-8")
    output = tmp_path / "plan.safetensors"
    given = ("calibrate", inputs.model, *inputs.data, "-o", output, "--config", config)
    refused(sarsteer(*given), *words)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha = [1, 2]", ["alpha is [1, 2]", "expected a number"]),
        ("alpha = true", ["alpha is True", "expected a number"]),
        ('alpha = "0.1"', ["alpha is '0.1'", "expected a number"]),
        ("rank = 2.5", ["rank is 2.5", "expected a whole number"]),
        ("rank = true", ["rank is True", "expected a whole number"]),
        ("overwrite = 1", ["overwrite is 1", "expected true or false"]),
        ("device = 3", ["device is 3", "expected a string"]),
        ('config = "other.toml"', ["unknown option 'config'"]),
        ("debug = true", ["unknown option 'debug'"]),
    ],
)
def test_a_config_value_of_another_type_is_refused_not_converted(
    text: str, words: list[str], inputs: Inputs, config: Path, tmp_path: Path
) -> None:
    config.write_text(text, encoding="utf-8")
    given = ("calibrate", inputs.model, *inputs.data, "-o", tmp_path / "plan.safetensors", "--config", config)
    refused(sarsteer(*given), str(config), *words)


def test_a_config_that_is_no_utf8_or_missing_is_refused(config: Path) -> None:
    refused(sarsteer("inspect", "x", "--config", config), str(config), "No such file")
    config.write_bytes(b"alpha = '\xff'\n")
    refused(sarsteer("inspect", "x", "--config", config), str(config), "not TOML")


def test_json_is_one_object_and_all_else_goes_to_stderr(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "plan.safetensors"
    result = sarsteer("calibrate", inputs.model, *inputs.data, "-o", output, "--json")
    found = answered_json(result)
    assert found["plan"] == str(output)
    assert "harmful: 6/6\n" in result.stderr
    assert "warning: rank 10 is more than 5 benign clips can span; using rank 4\n" in result.stderr


def test_debug_shows_the_traceback_and_only_debug(tmp_path: Path) -> None:
    code = "import sys; from sarsteer_export.cli import main; main(sys.argv[1:])"
    plain = run_python(code, "inspect", tmp_path / "absent")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == f"Error: {tmp_path / 'absent'}: no such file or directory\n"
    debugged = run_python(code, "inspect", tmp_path / "absent", "--debug")
    assert debugged.returncode != 0
    assert "Traceback (most recent call last):" in debugged.stderr
    assert "InputError" in debugged.stderr


def test_an_error_nobody_foresaw_is_one_message_and_says_it_is_a_defect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def explode(_path: Path) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("sarsteer_export.inspection.inspect.inspect", explode)
    result = sarsteer("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    for words in ("Error: unexpected ZeroDivisionError: division by zero", "defect", "--debug"):
        assert words in result.stderr
    assert isinstance(sarsteer("inspect", tmp_path, "--debug").exception, ZeroDivisionError)


def test_a_reader_of_stdout_that_leaves_early_is_no_defect(bundle_path: Path) -> None:
    code = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
from sarsteer_export.cli import main
main(sys.argv[1:])
"""
    done = run_python(code, "inspect", bundle_path / PLAN)
    assert done.stderr == ""


def test_text_output_is_not_json(bundle_path: Path, plan: SteeringPlan) -> None:
    text = answered(sarsteer("inspect", bundle_path / PLAN))
    assert text.count("strength 2 ") == len([edit for edit in plan.edits if isinstance(edit, Add)]) == 3
    assert not text.lstrip().startswith("{")
