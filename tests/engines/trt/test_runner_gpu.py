"""On a GPU: engines of TensorRT and TensorRT-RTX, built from the tiny decoder, do what ONNX Runtime does.

The engines multiply in float32 without TF32, as the reference does; sums are ordered otherwise, hence a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.errors import UnsupportedError
from engines.backends import BACKENDS, Backend
from engines.cuda_driver import cuda_driver
from engines.onnxruntime_runner import OnnxRuntimeDecoder, OnnxRuntimeRunner
from engines.opening import check_can_run
from engines.sidecar import Profile, ShapeRange
from engines.trace import record
from engines.trt.build import EngineSource, build_engine, check_can_build
from engines.trt.runner import TensorRTDecoder, TensorRTRunner
from tests.decoders import TinyDecoder
from tests.engines.graphs import WIDTH, decoder_graph
from tests.engines.trt.cases import ONE_PROFILE, PLAN, TWO_PROFILES, bindings, script, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_driver().problem is not None, reason=str(cuda_driver().problem)),
]
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value: the parity limit of float32 engines."""


def targets(backend: Backend) -> tuple[str, ...]:
    """The GPU of this machine, for a backend that builds for others too."""
    return (cuda_driver().gpus[0].compute_capability,) if backend.targets else ()


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each flavour that is installed and serves this GPU."""
    found = BACKENDS[request.param]
    try:
        check_can_run(found)
        check_can_build(found, targets(found))
    except UnsupportedError as error:
        pytest.skip(str(error))
    return found


def build(folder: Path, model: onnx.ModelProto, backend: Backend, profiles: Sequence[Profile]) -> Path:
    """An engine for the GPU of this machine."""
    graph, engine = folder / "tiny.onnx", folder / "tiny.engine"
    onnx.save(model, graph)
    source = EngineSource(
        graph, bindings(list(model.graph.input)), bindings(list(model.graph.output)), "float32", {}
    )
    build_engine(source, engine, backend, profiles, compute_capabilities=targets(backend))
    return engine


def assert_close(seen: np.ndarray, expected: np.ndarray) -> None:
    assert seen.shape == expected.shape
    assert seen.dtype == expected.dtype
    assert np.abs(seen - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("plan", [None, PLAN], ids=["unsteered", "steered"])
@pytest.mark.parametrize("profiles", [ONE_PROFILE, TWO_PROFILES], ids=["one profile", "two profiles"])
def test_a_decoder_engine_does_what_onnx_runtime_does(
    plan: Any, profiles: Sequence[Profile], backend: Backend, dynamo_decoder: TinyDecoder, tmp_path: Path
) -> None:
    model = whole(dynamo_decoder, plan)
    with OnnxRuntimeDecoder(model.SerializeToString()) as runner:
        expected = record(runner, script())
    with TensorRTDecoder(build(tmp_path, model, backend, profiles), backend=backend) as decoder:
        for _ in range(2):
            seen = record(decoder, script())
            for mine, theirs in [
                *zip(seen.steps, expected.steps, strict=True),
                (seen.cache, expected.cache),
            ]:
                assert list(mine) == list(theirs)
                for name in theirs:
                    assert_close(mine[name], theirs[name])


def test_a_one_shot_engine_is_right_before_and_after_it_is_captured(backend: Backend, tmp_path: Path) -> None:
    profile = Profile(
        "hand",
        {
            "inputs_embeds": ShapeRange((1, 1, WIDTH), (2, 3, WIDTH), (2, 4, WIDTH)),
            "past_key_values.0.key": ShapeRange((1, 1, 0, WIDTH), (2, 1, 2, WIDTH), (2, 1, 9, WIDTH)),
        },
    )
    model, random = decoder_graph(), np.random.default_rng(0)
    with (
        OnnxRuntimeRunner(model.SerializeToString()) as reference,
        TensorRTRunner(build(tmp_path, model, backend, (profile,)), backend=backend) as runner,
    ):
        for sequence, past in [(3, 2)] * 4 + [(1, 0)] * 3 + [(3, 2)] * 3:
            feeds = {
                "inputs_embeds": random.standard_normal((2, sequence, WIDTH)).astype(np.float32),
                "past_key_values.0.key": random.standard_normal((2, 1, past, WIDTH)).astype(np.float32),
            }
            expected = reference.run(feeds)
            for name, array in runner.run(feeds).items():
                assert_close(array, expected[name])


def test_closing_gives_the_memory_back(backend: Backend, dynamo_decoder: TinyDecoder, tmp_path: Path) -> None:
    path = build(tmp_path, whole(dynamo_decoder), backend, ONE_PROFILE)
    before = torch.cuda.memory_allocated()
    decoder = TensorRTDecoder(path, backend=backend)
    with decoder:
        record(decoder, script())
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before
