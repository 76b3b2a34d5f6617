"""`--help` and `--version`: at once, without the libraries that do the work."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from sarsteer_export.cli import COMMANDS
from tests.sarsteer_export.command_line import answered, refused, run_python, sarsteer

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")
ROOT = Path(__file__).parents[3]
CLASSES = {
    found
    for package in ("calibration", "engines", "graph_passes", "sarsteer_export")
    for path in (ROOT / package).rglob("*.py")
    for found in re.findall(r"^class ([A-Z][a-z]+[A-Z]\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
"""Names of classes of several words, which say nothing to who reads `--help`."""


def test_the_group_lists_every_command_and_the_exit_codes() -> None:
    text = answered(sarsteer("--help"))
    for name, purpose in COMMANDS.items():
        assert f"  {name} " in text
        assert purpose.split(";")[0] in text
    for meaning in (
        "0 done",
        "2 wrong input",
        "3 unsupported",
        "4 no steering",
        "5 engine",
        "6 parity",
        "130",
    ):
        assert meaning in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_an_example_and_the_shared_options(name: str) -> None:
    text = answered(sarsteer(name, "--help"))
    assert re.search(rf"Examples?:\n    sarsteer-export {name} ", text)
    for option in ("--json", "--config", "--debug", "--help"):
        assert option in text
    assert answered(sarsteer(name, "-h")) == text
    assert not CLASSES & set(re.findall(r"\w+", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_its_group_has_the_same_options(name: str) -> None:
    command = import_module(f"sarsteer_export.cli.{name.replace('-', '_')}").command
    assert "--debug" in answered(CliRunner().invoke(command, ["-h"]))


def test_help_imports_none_of_the_libraries_that_do_the_work() -> None:
    code = f"""
import json, sys
from click.testing import CliRunner
import sarsteer_export
from sarsteer_export.cli import COMMANDS, main
codes = [CliRunner().invoke(main, [*name, "--help"]).exit_code for name in ([], *([c] for c in COMMANDS))]
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    codes, imported = json.loads(done.stdout)
    assert codes == [0] * (1 + len(COMMANDS))
    assert imported == []


def test_version_is_the_package_s() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (number,) = re.findall(r'^version = "(.*)"$', project, re.MULTILINE)
    assert answered(sarsteer("--version")) == f"sarsteer-export, version {number}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_a_usage_error(name: str) -> None:
    refused(sarsteer(name, "--no-such-option"), "--no-such-option")


def test_an_unknown_command_is_a_usage_error() -> None:
    refused(sarsteer("bake"), "bake")
