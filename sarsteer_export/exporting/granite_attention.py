"""Granite Speech's attention within blocks, the same for clips that fill their last block and for others.

Its own code asks whether something is left over behind the last whole block. A trace would keep the answer for the
clip that was traced.

Dimensions: A clips, S positions, N blocks of C positions each, H heads.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechConformerAttention

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def blocks_of_any_length(model: nn.Module) -> Iterator[None]:
    """Within the block, a Granite Speech encoder attends as `attention` does; other models are left as they are."""
    found: list[Any] = [
        module for module in model.modules() if isinstance(module, GraniteSpeechConformerAttention)
    ]
    for module in found:
        module.forward = partial(attention, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def attention(module: Any, hidden_states: torch.Tensor, attention_dists: torch.Tensor) -> torch.Tensor:
    """What `GraniteSpeechConformerAttention.forward` computes of states (A, S, D)."""
    hidden = module.pre_norm(hidden_states)
    clips, length, _ = hidden.shape
    context = int(module.context_size)
    hidden = nn.functional.pad(hidden, (0, 0, 0, -length % context))
    blocks = hidden.shape[1] // context

    def split(states: torch.Tensor) -> torch.Tensor:
        heads = states.reshape(clips * blocks, context, module.num_heads, -1)
        return heads.transpose(1, 2)

    query = split(module.to_q(hidden))
    key, value = (split(part) for part in module.to_kv(hidden).chunk(2, dim=-1))
    distances = module.rel_pos_emb(attention_dists)
    bias = torch.einsum("b h c d, c r d -> b h c r", query, distances) * module.scale
    inside_C = torch.arange(context, device=hidden.device) < length - (blocks - 1) * context
    is_last_N = torch.arange(blocks, device=hidden.device) == blocks - 1
    outside_NCC = is_last_N[:, None, None] & ~(inside_C[:, None] & inside_C[None])
    outside = outside_NCC.repeat(clips, 1, 1)[:, None]
    bias = bias.masked_fill(outside, -torch.finfo(bias.dtype).max)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=module.scale)
    mixed = mixed.transpose(1, 2).reshape(clips, hidden.shape[1], -1)
    output: torch.Tensor = module.dropout(module.to_out(mixed[:, :length]))
    return output
