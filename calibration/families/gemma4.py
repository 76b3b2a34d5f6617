"""Gemma 4: logits are capped, and clips cut at the most embeddings that its processor makes of one."""

from __future__ import annotations

from typing import ClassVar

import torch

from calibration.model_adapter import ModelAdapter


class Gemma4(ModelAdapter):
    """Blocks at the end share keys and values; the decoder also takes an input for each of its blocks."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest clip the model hears whole."""
        return float(self.processor.audio_seq_length * self.processor.audio_ms_per_token / 1000)

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) of what the decoder returns, between plus and minus the cap."""
        logits_BSV = super().logits(hidden_BSD)
        cap = self.model.config.get_text_config().final_logit_softcapping
        return logits_BSV if cap is None else cap * torch.tanh(logits_BSV / cap)
