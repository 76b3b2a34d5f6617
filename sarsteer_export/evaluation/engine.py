"""A bundle as a respondent: its engines, and decoders that are steered otherwise in memory. Needs no torch.

Dimensions: B requests, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.onnxruntime_runner import OnnxRuntimeDecoder, provider_of
from graph_passes.onnx_file import read_graph
from graph_passes.patch import patch_model
from sarsteer_export.bundle.bundle import greedy
from sarsteer_export.bundle.manifest import ONNX_FOLDER, UNSTEERED_DECODER
from sarsteer_export.evaluation.respondent import Reply, log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from engines.runner import DecoderRunner
    from sarsteer_export.bundle.bundle import Bundle


class EngineRespondent:
    """An open bundle. `runtime`: what reports call that which runs it, by default its backend."""

    def __init__(self, bundle: Bundle, runtime: str | None = None) -> None:
        self._bundle = bundle
        self._plan_sha256 = bundle.plan.digest()
        self.runtime = bundle.backend.name if runtime is None else runtime

    def serves(self, plan: SteeringPlan | None) -> bool:
        """Whether the bundle holds the decoder, or the unsteered one that it can be patched from.

        TensorRT's engines are built as the bundle's own plan steers them.
        """
        own = plan is not None and plan.digest() == self._plan_sha256
        return own or self._bundle.has_unsteered

    @contextmanager
    def speaker(self, plan: SteeringPlan | None) -> Iterator[EngineSpeaker]:
        """The bundle with its own steered decoder, the unsteered one, or that one patched with another plan.

        The patched graph is opened from memory and reads the bundle's weights where they lie. Raises `InputError`
        when the bundle holds no unsteered decoder for what is asked.
        """
        if plan is None or plan.digest() == self._plan_sha256:
            yield EngineSpeaker(self._bundle, self._bundle.decoder(steering=plan is not None))
            return
        self._bundle.check_has_unsteered()
        folder = self._bundle.path / ONNX_FOLDER
        patched = patch_model(read_graph(self._bundle.path / UNSTEERED_DECODER), plan, force=True)
        with OnnxRuntimeDecoder(
            patched.model.SerializeToString(),
            data_folder=folder,
            providers=provider_of(self._bundle.backend),
        ) as decoder:
            yield EngineSpeaker(self._bundle, decoder)


@dataclass(frozen=True)
class EngineSpeaker:
    """A bundle's front end and encoder around one decoder."""

    bundle: Bundle
    decoder: DecoderRunner

    def replies(self, requests: Sequence[SpokenRequest], *, max_new_tokens: int) -> list[Reply]:
        """Greedy answers to a batch of requests."""
        ends = frozenset(self.bundle.manifest.tokens["end"])
        rows: list[list[int]] = [[] for _ in requests]
        for tokens_B in self._decoded(requests, greedy, max_new_tokens):
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                if not (row and row[-1] in ends):
                    row.append(token)
            if all(row[-1] in ends for row in rows):
                break
        decode = self.bundle.frontend.decode
        return [Reply(decode([token for token in row if token not in ends]), tuple(row)) for row in rows]

    def log_probabilities(
        self, requests: Sequence[SpokenRequest], tokens: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities (B, V) of the next token before each of the given ones, which are forced."""
        seen: list[NDArray[np.float32]] = []

        def forced(logits_BV: NDArray[Any]) -> NDArray[np.int64]:
            step = len(seen)
            seen.append(log_softmax(logits_BV))
            return np.array([row[min(step, len(row) - 1)] for row in tokens], dtype=np.int64)

        deque(self._decoded(requests, forced, max(map(len, tokens))), maxlen=0)
        return seen

    def _decoded(
        self,
        requests: Sequence[SpokenRequest],
        choose: Callable[[NDArray[Any]], NDArray[np.int64]],
        steps: int,
    ) -> Iterator[NDArray[np.int64]]:
        clips = [request.audio for request in requests]
        texts = [request.text for request in requests]
        return self.bundle.decoded(clips, texts, decoder=self.decoder, choose=choose, steps=steps)
