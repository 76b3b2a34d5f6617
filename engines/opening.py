"""Open a graph file or an engine on the backend it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.errors import UnsupportedError
from engines.backends import Runtime
from engines.cuda_driver import cuda_driver
from engines.onnxruntime_runner import OnnxRuntimeDecoder, OnnxRuntimeRunner, provider_of

if TYPE_CHECKING:
    from pathlib import Path

    from engines.backends import Backend
    from engines.runner import DecoderRunner, GraphRunner


def check_can_run(backend: Backend) -> None:
    """Raise `UnsupportedError`, with the remedy, when nothing of this backend can run on this machine.

    What only shows when a graph is opened (libraries of an execution provider) is raised then.
    """
    backend.load()
    if backend.runs_without_gpu:
        return
    if (problem := cuda_driver().problem) is not None:
        raise UnsupportedError(
            f"{backend.name} runs on an NVIDIA GPU, and {problem} here; `sarsteer-export doctor` shows what this "
            "machine can run"
        )
    if backend.runtime is Runtime.TENSORRT:
        from engines.trt.runner import check_torch_cuda

        check_torch_cuda(backend)


def open_graph(file: Path, backend: Backend) -> GraphRunner:
    """A runner of a one-shot graph: an ONNX file, or an engine for a backend that has engines."""
    if backend.runtime is Runtime.ONNX_RUNTIME:
        return OnnxRuntimeRunner(file, providers=provider_of(backend))
    from engines.trt.runner import TensorRTRunner

    return TensorRTRunner(file, backend=backend)


def open_decoder(file: Path, backend: Backend) -> DecoderRunner:
    """A runner of a decoder: an ONNX file, or an engine for a backend that has engines."""
    if backend.runtime is Runtime.ONNX_RUNTIME:
        return OnnxRuntimeDecoder(file, providers=provider_of(backend))
    from engines.trt.runner import TensorRTDecoder

    return TensorRTDecoder(file, backend=backend)
