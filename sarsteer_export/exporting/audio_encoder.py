"""The audio encoder with its projector, as a module from what the processor yields to embeddings of the decoder.

Dimensions: A clips, M mel bins, F feature frames, N audio embeddings of all clips, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import Phi4MultimodalForCausalLM

from calibration.errors import UnsupportedError
from sarsteer_export.exporting.granite_attention import blocks_of_any_length
from sarsteer_export.exporting.packed_encoders import (
    attention_of,
    is_packed,
    packed_attention,
    packing,
)
from sarsteer_export.exporting.phi4_encoder import Phi4AudioEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from calibration.lalm import Lalm

SAMPLE_SECONDS = ((1.3, 0.8), (0.5, 0.4))
"""Lengths of clips to trace with, and of others: what both make is the processor's constant."""


class AudioEncoderComponent(nn.Module):
    """The audio encoder with its projector, for models that `is_like_qwen2_audio`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
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
        """The inputs that it takes, and the mask that says which embeddings count."""
        known = inspect.signature(self.model.get_audio_features).parameters.values()
        named = [item.name for item in known if item.kind is not inspect.Parameter.VAR_KEYWORD]
        return tuple(dict.fromkeys([*named, "input_features_mask"]))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """What the processor yields for clips -> embeddings (N, D)."""
        known = inspect.signature(self.model.get_audio_features).parameters
        taken = {name: value for name, value in inputs.items() if name in known}
        with blocks_of_any_length(self.model):
            output = self.model.get_audio_features(**taken, return_dict=True)
        features: torch.Tensor = output.pooler_output
        if features.ndim == 3:  # (A, most, D): which of them count, the encoder or the processor says
            counted = getattr(output, "attention_mask", None)
            counted = inputs.get("input_features_mask") if counted is None else counted
            features = features.flatten(0, 1) if counted is None else features[counted.bool()]
        return features


class PackedAudioEncoder(nn.Module):
    """A packed encoder of Qwen's, told how its clips are packed; see `packed_encoders`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        inner: Any = getattr(model, "model", model)
        self.tower, self.projector = inner.audio_tower, getattr(inner, "multi_modal_projector", None)
        self._attention = attention_of(self.tower)
        self.config = model.config

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that it takes."""
        return (
            "input_features",
            "input_features_mask" if self.projector is not None else "feature_attention_mask",
        )

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Features (A, M, F), mask (A, F) -> embeddings (N, D).

        Not by the processor's names: transformers' exporter would pack inputs of those names itself, as constants.
        """
        packed = packing(self.tower, features, mask)
        with packed_attention(self.tower, self._attention):
            if self.projector is None:
                # Not called, which would run the hook by which its adapter packs clips, too.
                output = self.tower.forward(features, feature_lens=mask.sum(-1), **packed)
                embedded: torch.Tensor = output.last_hidden_state
            else:
                told = {name: packed[name] for name in ("cu_seqlens", "max_seqlen")}
                output = self.tower(input_features=features, input_features_mask=mask, **told)
                embedded = self.projector(output.last_hidden_state)
        return embedded


def flat_encoder(model: PreTrainedModel) -> FlatAudioEncoder | PackedAudioEncoder | Phi4AudioEncoder:
    """The audio encoder of a model that is not built like Qwen2-Audio, as a component.

    Raises `UnsupportedError` when the model does not say how audio is embedded.
    """
    if isinstance(model, Phi4MultimodalForCausalLM):
        return Phi4AudioEncoder(model)
    tower = getattr(getattr(model, "model", model), "audio_tower", None)
    return PackedAudioEncoder(model) if tower is not None and is_packed(tower) else FlatAudioEncoder(model)


def is_like_qwen2_audio(model: PreTrainedModel) -> bool:
    """Whether the audio encoder is built, masked and merged as Qwen2-Audio's."""
    return "Qwen2Audio" in type(model).__name__


@dataclass(frozen=True)
class EncoderSample:
    """Inputs to trace an audio encoder with, by name, and the sizes of each that no clip changes (None: those vary)."""

    inputs: dict[str, torch.Tensor]
    sizes: dict[str, tuple[int | None, ...]]


def encoder_sample(lalm: Lalm, names: Sequence[str]) -> EncoderSample:
    """Those of the named inputs that the model's processor yields for clips of several lengths."""
    inputs, others = (_processed(lalm, names, seconds) for seconds in SAMPLE_SECONDS)

    def fixed(name: str) -> tuple[int | None, ...]:
        sizes = zip(inputs[name].shape, others[name].shape, strict=True)
        return tuple(
            size if axis and size == other and name != "input_ids" else None
            for axis, (size, other) in enumerate(sizes)
        )

    return EncoderSample(inputs, {name: fixed(name) for name in inputs})


def _processed(lalm: Lalm, names: Sequence[str], seconds: Sequence[float]) -> dict[str, torch.Tensor]:
    """What the processor yields for clips of noise, ready for the model; one clip for an encoder that takes no more."""
    alone = getattr(lalm.adapter, "unmasked", None) is not None
    random = np.random.default_rng(0)
    lengths = [int(length * lalm.sampling_rate) for length in seconds[: 1 if alone else None]]
    clips = [random.standard_normal(length).astype(np.float32) * 0.1 for length in lengths]
    inputs = lalm.adapter.encode([""] * len(clips), clips)
    return {name: value for name, value in inputs.items() if name in names}
