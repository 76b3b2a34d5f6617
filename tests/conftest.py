"""Shared fixtures: a tiny checkpoint, spoken requests and the checkpoint's decoder as ONNX."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibration.lalm import Lalm, load_lalm
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from tests import tiny_lalm
from tests.decoders import TinyDecoder, export_with_dynamo, export_with_torchscript, export_with_transformers

transformers.utils.logging.disable_progress_bar()

# Tracing makes objects by the million and keeps them: looking through them every 700 is a fifth of its time.
gc.set_threshold(200_000, 20, 50)

SITES = [(site, positions) for site in Site for positions in (Positions.LAST, Positions.ALL)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Run a test as pytest does, from a call whose frame leaves room for those of all calls below it.

    CPython maps memory for frames in pieces of 16 KiB and gives a piece back when its first frame returns. Where a
    loop deep below pytest calls across the end of a piece, every call maps one: with traces a quarter of all time.
    """
    return _with_room(item, nextitem)


def _with_room(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    runner: Any = item.config.pluginmanager.get_plugin("runner")
    return runner.pytest_runtest_protocol(item=item, nextitem=nextitem)


# A frame of just over 1 MiB gets a piece of 2 MiB, the rest of which is for the frames below.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=1 << 17)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of a tiny Qwen2-Audio with random weights. Read-only for tests."""
    return tiny_lalm.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def lalm(checkpoint: Path) -> Lalm:
    """The tiny checkpoint, loaded. Tests leave it as they find it."""
    return load_lalm(checkpoint)


@pytest.fixture(scope="session")
def harmful_requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file of 6 spoken requests."""
    return tiny_lalm.save_requests(tmp_path_factory.mktemp("harmful"), count=6, seed=1)


@pytest.fixture(scope="session")
def benign_requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file of 5 other spoken requests."""
    return tiny_lalm.save_requests(tmp_path_factory.mktemp("benign"), count=5, seed=2)


@pytest.fixture(scope="session")
def exported_decoder(lalm: Lalm, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """The tiny checkpoint's decoder as the exporter in transformers writes it."""
    return export_with_transformers(lalm, tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="session")
def dynamo_decoder(lalm: Lalm, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """The same decoder by `torch.onnx.export(dynamo=True)`, with optimum's names."""
    return export_with_dynamo(lalm, tmp_path_factory.mktemp("dynamo"))


@pytest.fixture(scope="session")
def torchscript_decoder(lalm: Lalm, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """The same decoder by `torch.onnx.export(dynamo=False)` at opset 17, with optimum's names."""
    return export_with_torchscript(lalm, tmp_path_factory.mktemp("torchscript"))


@pytest.fixture(scope="session")
def fused_decoder(lalm: Lalm, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """The same decoder with residual adds fused into the norms behind them, for ONNX Runtime on CPU."""
    return export_with_transformers(lalm, tmp_path_factory.mktemp("fused"), ort_fusions="cpu")


@pytest.fixture(params=["exported_decoder", "dynamo_decoder", "torchscript_decoder"])
def standard_decoder(request: pytest.FixtureRequest) -> TinyDecoder:
    """Each exporter's graph of the tiny decoder in turn, in ONNX's own operators."""
    decoder: TinyDecoder = request.getfixturevalue(request.param)
    return decoder


@pytest.fixture(params=["exported_decoder", "dynamo_decoder", "torchscript_decoder", "fused_decoder"])
def any_decoder(request: pytest.FixtureRequest) -> TinyDecoder:
    """Each exporter's graph of the tiny decoder in turn."""
    decoder: TinyDecoder = request.getfixturevalue(request.param)
    return decoder


def random_basis(width: int, rank: int, *, seed: int) -> np.ndarray:
    """An orthonormal basis (D, K) float32."""
    random = np.random.default_rng(seed)
    return np.linalg.qr(random.standard_normal((width, rank)))[0].astype(np.float32)


def random_vector(width: int, *, seed: int, scale: float = 1.0) -> np.ndarray:
    """A vector (D,) float32."""
    return (scale * np.random.default_rng(seed).standard_normal(width)).astype(np.float32)


def one_edit(op: str, site: Site, positions: Positions, *, width: int, layers: int, layer: int) -> Edit:
    """An edit of the given kind whose effect is of the size of the stream itself."""
    placement = {"site": site, "positions": positions}
    if site is Site.FINAL_NORM_OUTPUT:
        layer = layers - 1
    if op == "add":
        return Add(layer, random_vector(width, seed=layer), strength=0.7, **placement)
    mean = random_vector(width, seed=layer + 50, scale=0.3)
    return Project(layer, random_basis(width, 4, seed=layer), mean, strength=1.3, **placement)


def plan_of(*edits: Edit, width: int = tiny_lalm.WIDTH, layers: int = tiny_lalm.LAYERS) -> SteeringPlan:
    """A plan for the tiny decoder."""
    return SteeringPlan(width, layers, edits)


def padded(kind: str, *, batch: int = 3, sequence: int = 5) -> torch.Tensor:
    """An attention mask (B, S): rows of unequal length, padded on one side, or all full."""
    mask = torch.ones(batch, sequence, dtype=torch.long)
    for row in range(1, batch):
        if kind == "left":
            mask[row, :row] = 0
        elif kind == "right":
            mask[row, sequence - row :] = 0
    return mask
