"""The audio encoder with its projector, as a module from what the processor yields to embeddings of the decoder.

Dimensions: A clips, M mel bins, F feature frames, N audio embeddings of all clips, D width.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from calibration.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from calibration.lalm import Lalm

TOKEN_INPUTS = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids"}
)
"""What a processor yields for the decoder; the rest is for the audio encoder."""
SAMPLE_SECONDS = (1.3, 0.8)
"""Lengths of the clips to trace with: distinct, so that no length is taken for a constant."""


class AudioEncoderComponent(nn.Module):
    """The audio encoder with its projector, for models built like Qwen2-Audio.

    Raises `UnsupportedError` when the model has no `audio_tower` and `multi_modal_projector`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not is_like_qwen2_audio(model):
            raise UnsupportedError(
                f"{type(model).__name__}: its audio encoder cannot be exported yet; expected audio_tower and "
                "multi_modal_projector as Qwen2-Audio has them"
            )
        inner: Any = getattr(model, "model", model)
        self.tower, self.projector = inner.audio_tower, inner.multi_modal_projector
        self.config = model.config

    def forward(
        self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (A, M, F), mask (A, F) -> embeddings (A, F / 4, D), the first lengths (A,) of which count."""
        frames_A, lengths_A = self.tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
        positions = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=input_features.device)
        attended = positions[None] < frames_A[:, None]
        lowest = torch.finfo(input_features.dtype).min
        bias = torch.where(attended[:, None, None, :], 0.0, lowest).to(input_features.dtype)
        encoded = self.tower(input_features, attention_mask=bias).last_hidden_state
        return self.projector(encoded), lengths_A


class FlatAudioEncoder(nn.Module):
    """The model's own `get_audio_features`; the embeddings of all clips follow one another, padding left out.

    Raises `UnsupportedError` for a model without it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        inner: Any = getattr(model, "model", model)
        if not hasattr(inner, "get_audio_features"):
            raise UnsupportedError(
                f"{type(model).__name__}: its audio encoder cannot be exported; expected a get_audio_features()"
            )
        self.model = inner
        self.config = model.config

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that it takes."""
        known = inspect.signature(self.model.get_audio_features).parameters.values()
        return tuple(item.name for item in known if item.kind is not inspect.Parameter.VAR_KEYWORD)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What the processor yields for clips -> embeddings (N, D)."""
        mask = inputs.get("input_features_mask")
        taken = {name: value for name, value in inputs.items() if name in self.names}
        output = self.model.get_audio_features(**taken, return_dict=True)
        features: torch.Tensor = output.pooler_output
        if features.ndim == 3:  # (A, most, D): which of them count, the encoder or the processor says
            counted = getattr(output, "attention_mask", None)
            counted = mask if counted is None else counted
            features = features.flatten(0, 1) if counted is None else features[counted.bool()]
        return features


def is_like_qwen2_audio(model: PreTrainedModel) -> bool:
    """Whether the audio encoder is built, masked and merged as Qwen2-Audio's."""
    return "Qwen2Audio" in type(model).__name__


def audio_inputs(lalm: Lalm) -> dict[str, torch.Tensor]:
    """What the model's processor yields for clips to trace with, on the model's device and in its dtype."""
    adapter = lalm.adapter
    alone = getattr(adapter, "unmasked", None) is not None
    random = np.random.default_rng(0)
    lengths = [int(seconds * lalm.sampling_rate) for seconds in SAMPLE_SECONDS[: 1 if alone else 2]]
    clips = [random.standard_normal(length).astype(np.float32) * 0.1 for length in lengths]
    inputs = adapter.encode([""] * len(clips), clips)
    component = FlatAudioEncoder(lalm.model)
    return {
        name: value
        for name, value in inputs.items()
        if name in component.names or (name not in TOKEN_INPUTS and name == "input_features_mask")
    }


def encoder_feeds(names: list[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a processor's outputs that an exported audio encoder reads."""
    return {name: inputs[name] for name in names}
