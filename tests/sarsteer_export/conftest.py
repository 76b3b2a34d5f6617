"""One calibrated plan, one export and one built bundle of the tiny checkpoint, shared by all tests here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import Result

from calibration.plan import SteeringPlan
from sarsteer_export import Bundle, load_bundle
from sarsteer_export.bundle.manifest import ONNX_FOLDER, PLAN, STEERED_DECODER, UNSTEERED_DECODER
from tests import tiny_lalm
from tests.sarsteer_export.command_line import sarsteer

ALPHA, RANK = 2.0, 2
"""Strong enough that the tiny model's answers change, weak enough that they do not all become one."""


@dataclass(frozen=True)
class Inputs:
    """What a user has: a checkpoint and two files of spoken requests."""

    model: Path
    harmful: Path
    benign: Path

    @property
    def data(self) -> tuple[str | Path, ...]:
        return ("--harmful", self.harmful, "--benign", self.benign)

    @property
    def quick_build(self) -> tuple[str | Path, ...]:
        """A build with the same model, data and steering that measures no behaviour."""
        steering = ("--alpha", str(ALPHA), "--rank", str(RANK))
        return ("build", self.model, *self.data, *steering, "--prompts", "2", "--decode-steps", "2")

    @property
    def build(self) -> tuple[str | Path, ...]:
        """The arguments of the build that made `bundle_path`, but for its output and `--json`."""
        measured = ("--eval-harmful", self.harmful, "--eval-benign", self.benign, "--max-new-tokens", "4")
        measured += ("--allow-overlap", "all")
        steering = ("--alpha", str(ALPHA), "--rank", str(RANK))
        return (
            "build",
            self.model,
            *self.data,
            *steering,
            *measured,
            "--prompts",
            "2",
            "--decode-steps",
            "3",
        )


@pytest.fixture(scope="session")
def inputs(checkpoint: Path, harmful_requests: Path, benign_requests: Path) -> Inputs:
    return Inputs(checkpoint, harmful_requests, benign_requests)


@pytest.fixture(scope="session")
def build_result(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The first build of a bundle, by the command line with `--json`: where it is, and what was printed."""
    path = tmp_path_factory.mktemp("built") / "bundle"
    return path, sarsteer(*inputs.build, "-o", path, "--json")


@pytest.fixture(scope="session")
def bundle_path(build_result: tuple[Path, Result]) -> Path:
    """The bundle of the tiny checkpoint. Read-only for tests."""
    path, result = build_result
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def bundle_copy(bundle_path: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Iterator[Bundle]:
    """The bundle, opened."""
    with load_bundle(bundle_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def plan(bundle_path: Path) -> SteeringPlan:
    return SteeringPlan.load(bundle_path / PLAN)


@pytest.fixture(scope="session")
def decoder_folder(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unsteered decoder as `export` wrote it. Read-only for tests; see `decoder_copy`."""
    folder = tmp_path_factory.mktemp("decoder") / "onnx"
    folder.mkdir()
    shutil.copy(bundle_path / UNSTEERED_DECODER, folder / "decoder.onnx")
    data = f"{STEERED_DECODER.name}_data"
    shutil.copy(bundle_path / ONNX_FOLDER / data, folder / data)
    return folder


@pytest.fixture
def decoder_copy(decoder_folder: Path, tmp_path: Path) -> Path:
    """The unsteered decoder, weights beside it, in a folder of this test's own."""
    return Path(shutil.copytree(decoder_folder, tmp_path / "onnx")) / "decoder.onnx"


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape with other weights."""
    return tiny_lalm.save_checkpoint(tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture(scope="session")
def deeper_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one more decoder block."""
    return tiny_lalm.save_checkpoint(tmp_path_factory.mktemp("deeper"), layers=tiny_lalm.LAYERS + 1)
