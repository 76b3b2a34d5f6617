"""Phi-4-multimodal's audio encoder with its projector for speech, called part by part.

Its own code makes masks with NumPy and asks how long a clip is: a trace would keep the answers of the clip that was
traced. Here both are computed by sizes. It hears padding, so it takes one clip.

Dimensions: F feature frames, M mel bins, P positions behind the subsampling, W positions of a window, N windows,
D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 500
"""Positions beyond which a clip is cut into windows of so many, the last filled with zeros: the model's own number."""


class Phi4AudioEncoder(nn.Module):
    """What `Phi4MultimodalAudioEmbedding` makes of a clip that comes without pictures."""

    names = ("audio_input_features",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        whole: Any = model
        self.embedding: Any = whole.get_decoder().embed_tokens_extend.audio_embed
        self.config = model.config

    def of_several_windows(self, features: torch.Tensor) -> torch.Tensor:
        """Features (1, F, M), repeated to more than a window: of one window, a trace would take their number for 1."""
        reduction = int(self.embedding.encoder.config.time_reduction)
        return features.repeat(1, WINDOW * reduction // features.shape[1] + 2, 1)

    def forward(self, audio_input_features: torch.Tensor) -> torch.Tensor:
        """Features (1, F, M) -> embeddings (P, D)."""
        encoder = self.embedding.encoder
        hidden, _ = encoder.embed(encoder.encoder_embedding(audio_input_features), None)
        positions = hidden.shape[1]
        width = torch.sym_min(positions, WINDOW)  # type: ignore[no-untyped-call]
        windows = (positions + width - 1) // width
        padded = nn.functional.pad(hidden[0], (0, 0, 0, windows * width - positions))
        hidden_NWD = padded.view(windows, width, hidden.shape[2])
        bias = encoder.relative_attention_bias_layer(hidden_NWD)
        bias = bias + streaming_mask(encoder.config, width, device=hidden.device)
        for layer in encoder.encoders:
            hidden_NWD = layer(hidden_NWD, bias)
        encoded = hidden_NWD.reshape(windows * width, hidden.shape[2])[:positions]
        projected = nn.functional.gelu(self.embedding.up_proj_for_speech(encoded))
        embedded: torch.Tensor = self.embedding.down_proj_for_speech(projected)
        return embedded


def streaming_mask(config: Any, width: int, *, device: torch.device) -> torch.Tensor:
    """What the encoder adds to its attention bias (W, W): 1 where a position's own and earlier chunks are, else 0.

    It was meant to hide the rest. A model without chunks has one chunk of all positions.
    """
    chunk = int(config.chunk_size)
    index = torch.arange(width, device=device)
    chunks = index // chunk if chunk > 0 else torch.zeros_like(index)
    behind = chunks[:, None] - chunks[None]
    return (behind >= 0) & (behind <= int(config.left_chunk))
