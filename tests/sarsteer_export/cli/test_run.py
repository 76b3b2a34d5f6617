"""`run`: answers from a bundle, where no torch is installed, and the same ones that the eager model gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from calibration.lalm import Lalm
from calibration.plan import SteeringPlan
from calibration.requests import read_requests
from sarsteer_export.behaviour import eager_answers
from sarsteer_export.bundle.manifest import MANIFEST, UNSTEERED_DECODER
from tests.sarsteer_export.command_line import answered, answered_json, refused, run_python, sarsteer
from tests.sarsteer_export.conftest import Inputs

TOKENS = 12
ABSENT = "import sys; sys.modules['torch'] = None\n"
"""As where torch is not installed: it is not found, and importing it fails."""
FORBIDDEN = """
import importlib.abc, importlib.machinery, sys

class Forbidden(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition('.')[0] == 'torch' else None
    def create_module(self, spec):
        raise AssertionError(f'{spec.name} was imported')
    def exec_module(self, module):
        raise AssertionError(f'{module} was imported')

sys.meta_path.insert(0, Forbidden())
"""
"""As where torch is installed, found, and must not be touched."""
COMMAND = "import sys; from sarsteer_export.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def eager(lalm: Lalm, inputs: Inputs, plan: SteeringPlan) -> dict[bool, str]:
    """The eager model's answer to the first harmful request, steered (True) and not."""
    (first, *_) = read_requests(inputs.harmful)
    return {
        steering: eager_answers(lalm, [first], plan if steering else None, max_new_tokens=TOKENS)[0]
        for steering in (True, False)
    }


@pytest.fixture
def given(bundle_path: Path, inputs: Inputs) -> tuple[str | Path, ...]:
    (first, *_) = read_requests(inputs.harmful)
    limit = ("--max-new-tokens", str(TOKENS))
    return ("run", bundle_path, "--audio", first.audio, "--text", first.text, *limit)


@pytest.mark.parametrize("torch", [ABSENT, FORBIDDEN], ids=["absent", "forbidden"])
def test_run_needs_no_torch_and_says_what_the_steered_eager_model_says(
    given: tuple[str | Path, ...], eager: dict[bool, str], torch: str
) -> None:
    done = run_python(torch + COMMAND, *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == eager[True] + "\n"
    assert done.stderr == ""


def test_no_steering_says_what_the_plain_eager_model_says(
    given: tuple[str | Path, ...], eager: dict[bool, str]
) -> None:
    assert eager[False] != eager[True]
    assert answered(sarsteer(*given, "--no-steering")) == eager[False] + "\n"
    assert answered(sarsteer(*given)) == eager[True] + "\n"


def test_json_holds_the_answer(given: tuple[str | Path, ...], eager: dict[bool, str]) -> None:
    assert answered_json(sarsteer(*given, "--json")) == {"answer": eager[True], "steering": True}
    assert answered_json(sarsteer(*given, "--no-steering", "--json")) == {
        "answer": eager[False],
        "steering": False,
    }


def test_text_alone_is_asked_without_audio(bundle_path: Path, given: tuple[str | Path, ...]) -> None:
    alone = answered(sarsteer("run", bundle_path, "--text", given[5], "--max-new-tokens", str(TOKENS)))
    assert alone.strip()
    assert alone != answered(sarsteer(*given))


def test_without_the_unsteered_decoder_no_steering_is_refused(
    bundle_copy: Path, given: tuple[str | Path, ...]
) -> None:
    (bundle_copy / UNSTEERED_DECODER).unlink()
    manifest = json.loads((bundle_copy / MANIFEST).read_text(encoding="utf-8"))
    del manifest["files"][UNSTEERED_DECODER.as_posix()]
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    moved = ("run", bundle_copy, *given[2:])
    refused(sarsteer(*moved, "--no-steering"), "no unsteered decoder", "--keep-unsteered")
    assert answered(sarsteer(*moved)) == answered(sarsteer(*given))


def test_no_tokens_is_refused(bundle_path: Path) -> None:
    refused(sarsteer("run", bundle_path, "--text", "hello", "--max-new-tokens", "0"), "max_new_tokens is 0")


@pytest.mark.parametrize("text", ["<|AUDIO|>", "listen: <|AUDIO|><|AUDIO|>"])
def test_a_text_that_holds_the_audio_token_is_refused(bundle_path: Path, text: str) -> None:
    refused(sarsteer("run", bundle_path, "--text", text), "audio token")


def test_a_bundle_that_moved_answers_the_same(
    given: tuple[str | Path, ...], bundle_path: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(bundle_path, tmp_path / "über bundle"))
    assert answered(sarsteer("run", moved, *given[2:])) == answered(sarsteer(*given))
