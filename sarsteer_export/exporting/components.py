"""The decoder and the token embedding, as modules with flat, named inputs and outputs.

Dimensions: B batch, S sequence of this pass, P past, T = P + S, D width, V vocabulary, L blocks, E width of what
each block reads of a token beside the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class DecoderComponent(nn.Module):
    """The language model and its head: one graph for prefill and decode.

    The logits are those of the model's own `forward`, whatever it does behind its head (Granite divides, Gemma
    caps). A model whose parts were named, or whose code is not in transformers, gives its decoder and its adapter's
    `logits` instead. Positions have one axis: those of text and audio are equal on all axes that a model has.
    """

    def __init__(self, source: PreTrainedModel | ModelAdapter) -> None:
        super().__init__()
        self._adapter = adapter = _adapter_of(source)
        self.parts = adapter.parts
        self.config = getattr(self.parts.decoder, "config", None)
        self.per_layer_width = per_layer_width(self.parts.decoder)
        if adapter.names is None and type(adapter.model).__module__.startswith("transformers."):
            self.model = adapter.model
        else:
            self.model, self.decoder, self.lm_head = None, self.parts.decoder, self.parts.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Embeddings (B, S, D), mask (B, T), positions (B, S), cache of P -> logits (B, S, V), cache of T.

        `per_layer_inputs`: (B, S, L, E), for a decoder whose blocks read them.
        """
        more = {} if per_layer_inputs is None else {"per_layer_inputs": per_layer_inputs}
        inputs: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": True,
        }
        if self.model is not None:
            output = self.model(**inputs, **more)
            return output.logits, output.past_key_values
        output = self.decoder(**inputs, **more)
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        cache = output[1] if isinstance(output, tuple) else output.past_key_values
        return self._adapter.logits(hidden), cache


class EmbedTokensComponent(nn.Module):
    """The token embedding, and of each token what the decoder's blocks read beside the stream, if they do."""

    def __init__(self, source: PreTrainedModel | ModelAdapter) -> None:
        super().__init__()
        adapter = _adapter_of(source)
        embedding: Any = adapter.embed_tokens
        self.embedding = embedding
        self.config = adapter.model.config
        decoder: Any = adapter.parts.decoder
        self.per_layer = decoder if per_layer_width(decoder) else None
        audio = adapter.audio_token_id
        # Models embed something else in the place of a clip: its token may have no row of its own.
        outside = audio is not None and (self.per_layer is not None or audio >= len(embedding.weight))
        self.replaced = audio if outside else None
        padding = getattr(getattr(decoder, "config", None), "pad_token_id", None)
        self.replacement = padding if isinstance(padding, int) else 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, S) -> embeddings (B, S, D), and (B, S, L, E) for blocks that read them."""
        if self.replaced is not None:
            input_ids = torch.where(input_ids == self.replaced, self.replacement, input_ids)
        embedded: torch.Tensor = self.embedding(input_ids)
        if self.per_layer is None:
            return embedded
        return embedded, self.per_layer.get_per_layer_inputs(input_ids, None)


def per_layer_width(decoder: nn.Module) -> int:
    """The width of what each block reads of a token beside the stream; 0 for most decoders."""
    return int(getattr(decoder, "hidden_size_per_layer_input", 0) or 0)


def _adapter_of(source: PreTrainedModel | ModelAdapter) -> ModelAdapter:
    return source if isinstance(source, ModelAdapter) else ModelAdapter(source, None)
