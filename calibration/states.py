"""Hidden states of the residual stream at the last attended position of every decoder block.

Dimensions: N requests, L decoder blocks, B batch, S sequence, T past and present, D width.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from calibration.audio import MAYBE_SHORT_SECONDS
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import audio_token_count, encode_requests
from calibration.requests import load_audio
from calibration.token_positions import last_attended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.decoder_parts import DecoderParts
    from calibration.lalm import Lalm
    from calibration.requests import SpokenRequest

    Progress: TypeAlias = Callable[[str, int, int], None]


LEAST_AUDIO_TOKENS = 2
"""Below this the model's processor takes the audio token for one that it did not expand yet."""
_COUNTING = Lock()
"""A processor serves one thread at a time."""


@dataclass(frozen=True)
class CalibrationStates:
    """Block outputs at the last prompt position, float32, each (N, L, D); METHOD notation in brackets.

    `harmful_NLD`: harmful audio with its prompt [h_l(a, t)]. `refused_NLD`: the same audio, the refusal
    text concatenated to the prompt [h_l(a, t + r)]. `benign_NLD`: benign audio with its prompt [H_safe].
    """

    harmful_NLD: NDArray[np.float32]
    refused_NLD: NDArray[np.float32]
    benign_NLD: NDArray[np.float32]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states (B, S, D) in what a decoder block returns (a tensor, or a tuple of it first)."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"a decoder block returned {type(output).__name__}; expected a tensor or a tuple")
    if hidden.ndim != 3:
        raise UnsupportedError(
            f"a decoder block returned a tensor of shape {tuple(hidden.shape)}; expected one residual stream "
            "(batch, sequence, width)"
        )
    return hidden


@contextmanager
def recorded_block_outputs(parts: DecoderParts) -> Iterator[list[torch.Tensor]]:
    """Within the block, the list holds each decoder block's latest output (B, S, D), in block order."""
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(parts.blocks)

    def record(layer: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = hidden_of(output)

        return hook

    handles = [block.register_forward_hook(record(layer)) for layer, block in enumerate(parts.blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_last_states(parts: DecoderParts) -> Iterator[list[torch.Tensor]]:
    """Within the block, the list holds each block's latest output in its last column, float32 (B, D), in block order.

    Nothing else of the outputs is kept. For passes that are padded on the left, where every row ends in that column.
    """
    last: list[torch.Tensor] = [torch.empty(0)] * len(parts.blocks)

    def record(layer: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            last[layer] = hidden_of(output)[:, -1].float().clone()

        return hook

    handles = [block.register_forward_hook(record(layer)) for layer, block in enumerate(parts.blocks)]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


def last_position_states(
    lalm: Lalm, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
) -> NDArray[np.float32]:
    """Block outputs at the last prompt position of B requests, float32 (B, L, D)."""
    inputs = encode_requests(lalm, texts, audios)
    with torch.inference_mode(), recorded_block_outputs(lalm.parts) as outputs:
        lalm.model(**inputs, use_cache=False)
        last_BS = last_attended(inputs["attention_mask"], outputs[0].shape[1])
        states_BLD = torch.stack([hidden_BSD[last_BS].float() for hidden_BSD in outputs], dim=1)
    return states_BLD.cpu().numpy()


def load_clips(lalm: Lalm, requests: Sequence[SpokenRequest]) -> list[NDArray[np.float32]]:
    """The clips of some requests, each (samples,) float32 at the rate the model hears."""
    return [
        load_audio(request.clip(), sampling_rate=lalm.sampling_rate, max_seconds=lalm.max_audio_seconds)
        for request in requests
    ]


def heard_clips(lalm: Lalm, requests: Sequence[SpokenRequest]) -> list[NDArray[np.float32]] | None:
    """The clips as `encode_requests` takes them: None for a model that hears nothing."""
    return load_clips(lalm, requests) if lalm.hears else None


def check_clip(lalm: Lalm, request: SpokenRequest) -> NDArray[np.float32] | None:
    """A clip that the model can take, (samples,) float32; None for a model that hears none.

    Raises `InputError` naming it when it cannot be read or is too short or too long for the model. A model that hears
    takes no text alone, and one that does not no clips.
    """
    if not lalm.hears:
        if request.audio is not None:
            raise InputError(f"{request}: the model hears no audio; expected a record of text alone")
        return None
    (clip,) = load_clips(lalm, [request])
    if clip.size < MAYBE_SHORT_SECONDS * lalm.sampling_rate:
        with _COUNTING:
            tokens = audio_token_count(lalm, clip)
        if tokens < LEAST_AUDIO_TOKENS:
            raise InputError(
                f"audio {request.audio}: too short, {clip.size} samples at {lalm.sampling_rate} Hz; the model "
                f"makes {tokens} embeddings of it, expected at least {LEAST_AUDIO_TOKENS}"
            )
    return clip
