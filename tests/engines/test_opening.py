"""A file is opened by the backend that it belongs to, and what this machine cannot run is refused at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.errors import InputError, UnsupportedError
from engines import opening
from engines.backends import BACKENDS, CPU_BACKEND, Runtime
from engines.cuda_driver import NO_DRIVER, CudaDriver, Gpu, cuda_driver
from engines.onnxruntime_runner import OnnxRuntimeDecoder, OnnxRuntimeRunner
from engines.opening import check_can_run, open_decoder, open_graph
from engines.sidecar import BuildFacts, EngineRecord, Refit, sidecar_of
from engines.trt.runner import TensorRTDecoder, TensorRTRunner
from tests.engines.graphs import WIDTH, decoder_graph
from tests.engines.trt import stand_in
from tests.engines.trt.cases import bindings

GPU = CudaDriver("13.0", (Gpu("Test GPU", "8.9", 2**34),), None, "580.95.05")
NOTHING = CudaDriver(None, (), NO_DRIVER)
RTX = dataclasses.replace(BACKENDS["tensorrt-rtx"], module=stand_in.__name__)
GPU_ROWS = [row for row in BACKENDS.values() if not row.runs_without_gpu]
EMBEDS = np.ones((1, 1, WIDTH), np.float32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[CudaDriver], None]:
    """What the driver says."""

    def says(answer: CudaDriver) -> None:
        for module in ("engines.opening", "engines.trt.opened"):
            monkeypatch.setattr(f"{module}.cuda_driver", lambda: answer)

    return says


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(decoder_graph(), tmp_path / "decoder.onnx")
    return tmp_path / "decoder.onnx"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of the stand-in, with its sidecar."""
    path = tmp_path / "decoder.engine"
    model = decoder_graph()
    path.write_bytes(stand_in.serialized(model, ()))
    EngineRecord(
        backend=RTX.name,
        backend_version=RTX.version(),
        compute_capabilities=("8.9",),
        precision="float32",
        inputs=bindings(list(model.graph.input)),
        outputs=bindings(list(model.graph.output)),
        profiles=(),
        graph={"file": "decoder.onnx"},
        engine={"file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64},
        plan_sha256=None,
        steering=(),
        refit=Refit((), "the graph holds no steering constants"),
        build=BuildFacts(1.0, 1, 1, 1, "test"),
        warnings=(),
    ).write(sidecar_of(path))
    return path


def test_onnx_runtime_opens_graphs(graph: Path) -> None:
    with open_graph(graph, CPU_BACKEND) as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert not isinstance(runner, OnnxRuntimeDecoder)
        past = np.zeros((1, 1, 0, WIDTH), np.float32)
        seen = runner.run({"inputs_embeds": EMBEDS, "past_key_values.0.key": past})
    with open_decoder(graph, CPU_BACKEND) as decoder:
        assert isinstance(decoder, OnnxRuntimeDecoder)
        np.testing.assert_array_equal(decoder.step({"inputs_embeds": EMBEDS})["logits"], seen["logits"])


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("onnxruntime-cuda", ("CUDAExecutionProvider", {"use_tf32": "0"})),
        ("onnxruntime-tensorrt", ("TensorrtExecutionProvider", {})),
    ],
)
@pytest.mark.parametrize(
    ("opener", "kind"), [(open_graph, "OnnxRuntimeRunner"), (open_decoder, "OnnxRuntimeDecoder")]
)
def test_each_row_of_onnx_runtime_opens_with_its_own_provider_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    graph: Path,
    name: str,
    provider: tuple[str, dict[str, str]],
    opener: Callable[..., Any],
    kind: str,
) -> None:
    monkeypatch.setattr(opening, kind, lambda file, *, providers: (file, tuple(providers)))
    assert opener(graph, BACKENDS[name]) == (graph, (provider,))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_both_flavours_of_tensorrt_open_engines(engine: Path, name: str) -> None:
    """What an engine reads and computes is known before a GPU is asked for."""
    row = dataclasses.replace(BACKENDS[name], module=stand_in.__name__)
    runner, decoder = open_graph(engine, row), open_decoder(engine, row)
    assert type(runner) is TensorRTRunner
    assert type(decoder) is TensorRTDecoder
    assert [spec.name for spec in runner.inputs] == ["inputs_embeds", "past_key_values.0.key"]
    with pytest.raises(InputError, match="sidecar cannot be read"):
        open_decoder(engine.with_name("none.engine"), row)


def test_an_engine_is_refused_when_it_is_entered_where_it_cannot_run(
    engine: Path, driver: Callable[[CudaDriver], None]
) -> None:
    driver(NOTHING)
    with pytest.raises(UnsupportedError, match="tensorrt-rtx runs on an NVIDIA GPU"), open_graph(engine, RTX):
        pass


def test_the_cpu_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "cuda_driver", None)
    check_can_run(CPU_BACKEND)


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: row.name)
def test_without_a_driver_every_other_row_is_refused_with_the_remedy(
    row: Any, driver: Callable[[CudaDriver], None]
) -> None:
    driver(NOTHING)
    installed = dataclasses.replace(row, module="onnxruntime")
    with pytest.raises(UnsupportedError) as caught:
        check_can_run(installed)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        f"{row.name} runs on an NVIDIA GPU, and no NVIDIA driver is installed here; `sarsteer-export doctor` shows "
        "what this machine can run"
    )


def test_a_library_that_is_missing_is_said_before_the_driver_is_asked(
    driver: Callable[[CudaDriver], None],
) -> None:
    driver(NOTHING)
    missing = dataclasses.replace(RTX, module="no_such_tensorrt")
    with pytest.raises(
        UnsupportedError, match=r"No module named 'no_such_tensorrt'.*pip install tensorrt-rtx"
    ):
        check_can_run(missing)


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("reachable", [True, False])
def test_with_a_gpu_engines_need_one_that_pytorch_reaches(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[[CudaDriver], None], row: Any, reachable: bool
) -> None:
    """ONNX Runtime has memory of its own; engines run in PyTorch's."""
    driver(GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: reachable)
    installed = dataclasses.replace(row, module="onnxruntime")
    if reachable or row.runtime is Runtime.ONNX_RUNTIME:
        check_can_run(installed)
        return
    with pytest.raises(
        UnsupportedError, match=r"cannot reach the GPU; the driver serves CUDA 13\.0: install"
    ):
        check_can_run(installed)


@pytest.mark.skipif(cuda_driver().problem is None, reason="this machine has a GPU")
def test_this_machine_is_asked() -> None:
    with pytest.raises(UnsupportedError, match=r"and .* here; `sarsteer-export doctor`"):
        check_can_run(RTX)
