"""The three parts of a LALM that are exported, as modules with flat, named inputs and outputs.

Dimensions: B batch, A clips, S sequence of this pass, P past, T = P + S, D width, V vocabulary,
F feature frames, M mel bins, H KV heads, W head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibration.decoder_parts import find_decoder
from calibration.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class DecoderComponent(nn.Module):
    """The language model and its head: one graph for prefill and decode."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        parts = find_decoder(model)
        self.decoder = parts.decoder
        self.lm_head = parts.lm_head
        self.config = parts.decoder.config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """Embeddings (B, S, D), mask (B, T), positions (B, S), cache of P -> logits (B, S, V), cache of T."""
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        return self.lm_head(output.last_hidden_state), output.past_key_values


class EmbedTokensComponent(nn.Module):
    """The token embedding."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        accessors: Any = model
        self.embedding = accessors.get_input_embeddings()
        self.config = model.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, S) -> embeddings (B, S, D)."""
        embedded: torch.Tensor = self.embedding(input_ids)
        return embedded


class AudioEncoderComponent(nn.Module):
    """The audio encoder with its projector, for models built like Qwen2-Audio.

    Raises `UnsupportedError` when the model has no `audio_tower` and `multi_modal_projector`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        inner: Any = getattr(model, "model", model)
        tower, projector = getattr(inner, "audio_tower", None), getattr(inner, "multi_modal_projector", None)
        if tower is None or projector is None or not hasattr(tower, "_get_feat_extract_output_lengths"):
            raise UnsupportedError(
                f"{type(model).__name__}: its audio encoder cannot be exported yet; expected audio_tower and "
                "multi_modal_projector as Qwen2-Audio has them"
            )
        self.tower, self.projector = tower, projector
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
