"""Where parity runs its decoders: graphs in memory, probed or wrong on purpose, and the file that is shipped."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engines.onnxruntime_runner import OnnxRuntimeDecoder, provider_of
from engines.opening import open_decoder
from engines.sidecar import ENGINE_SUFFIX, EngineRecord
from engines.trt.build import build_engine
from sarsteer_export.engine_build import engine_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from onnx import ModelProto

    from engines.backends import Backend
    from engines.runner import DecoderRunner


class ParityRuntime(Protocol):
    """Opens decoders on one backend, for the length of a `with` block."""

    def graph(self, model: ModelProto, data_folder: Path) -> AbstractContextManager[DecoderRunner]:
        """A graph in memory whose external data lies in `data_folder`."""
        ...

    def file(self, decoder: Path) -> AbstractContextManager[DecoderRunner]:
        """The file that is shipped: an ONNX file, or an engine."""
        ...


@dataclass(frozen=True)
class OnnxRuntimeParity:
    """Parity on an execution provider of ONNX Runtime."""

    backend: Backend

    def graph(self, model: ModelProto, data_folder: Path) -> AbstractContextManager[DecoderRunner]:
        """Run the graph as it is."""
        return OnnxRuntimeDecoder(
            model.SerializeToString(), data_folder=data_folder, providers=provider_of(self.backend)
        )

    def file(self, decoder: Path) -> AbstractContextManager[DecoderRunner]:
        """Run the ONNX file."""
        return open_decoder(decoder, self.backend)


@dataclass(frozen=True)
class TensorRTParity:
    """Parity of an engine. Graphs in memory are built into engines like it, and thrown away.

    `like`: the sidecar of the engine that is shipped.
    """

    backend: Backend
    like: EngineRecord

    @contextmanager
    def graph(self, model: ModelProto, data_folder: Path) -> Iterator[DecoderRunner]:
        """Build an engine of the graph, and run it."""
        source = engine_source(data_folder / "graph.onnx", model)
        chosen = self.like.compute_capabilities
        with tempfile.TemporaryDirectory(prefix="sarsteer-parity-") as scratch:
            engine = Path(scratch) / f"decoder{ENGINE_SUFFIX}"
            build_engine(
                source,
                engine,
                self.backend,
                self.like.profiles,
                compute_capabilities=()
                if chosen == self.backend.targets or not self.backend.targets
                else chosen,
            )
            with open_decoder(engine, self.backend) as runner:
                yield runner

    def file(self, decoder: Path) -> AbstractContextManager[DecoderRunner]:
        """Run the engine file."""
        return open_decoder(decoder, self.backend)
