"""Qwen's packed audio encoders, their packing computed by tensors alone.

The encoders of Qwen2.5-Omni, Qwen3-Omni and Qwen3-ASR cut clips into chunks, drop what pads them, and attend within
windows of the packed rest. Their own code cuts with Python lists, which no trace follows. They take each of those
results ready made, too; here they are made from masks. Attention, which is told the window of every position instead
of the windows' ends, masks what lies in other windows.

Dimensions: A clips, M mel bins, F feature frames, C chunks of all clips, W frames of a chunk, T packed positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

PACKED = "sarsteer_flash_packed"
"""Name of the attention. Encoders that are told windows, and not sequences, look for "flash" in it."""


def is_packed(encoder: nn.Module) -> bool:
    """Whether an audio encoder packs chunks of its clips."""
    return hasattr(encoder, "n_window") and hasattr(getattr(encoder, "config", None), "n_window")


def attention_of(encoder: Any) -> list[Callable[..., Any]]:
    """The attention of every layer as the model has it: transformers' exporter puts another in its place to trace."""
    return [MethodType(type(layer.self_attn).forward, layer.self_attn) for layer in encoder.layers]


@contextmanager
def packed_attention(encoder: Any, own: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within the block, the encoder's `own` attention runs, within windows that are told by position."""
    AttentionInterface.register(PACKED, _attention)
    before = encoder.config._attn_implementation
    encoder.config._attn_implementation = PACKED
    for layer, attention in zip(encoder.layers, own, strict=True):
        layer.self_attn.forward = attention
    try:
        yield
    finally:
        encoder.config._attn_implementation = before
        for layer in encoder.layers:
            del layer.self_attn.forward


def packing(encoder: Any, features_AMF: torch.Tensor, mask_AF: torch.Tensor) -> dict[str, Any]:
    """What a packed encoder takes ready made, by the names of its arguments.

    `cu_seqlens` holds the window of every packed position, for `packed_attention`.
    """
    width = 2 * int(encoder.n_window)
    missing = -mask_AF.shape[1] % width
    features_AMF = torch.nn.functional.pad(
        features_AMF * mask_AF[:, None].to(features_AMF.dtype), (0, missing)
    )
    mask_AF = torch.nn.functional.pad(mask_AF.long(), (0, missing))
    clips, bins, frames = features_AMF.shape
    per_clip = frames // width
    lengths_C = mask_AF.reshape(clips * per_clip, width).sum(-1)
    chunks = features_AMF.reshape(clips, bins, per_clip, width).permute(0, 2, 1, 3).reshape(-1, bins, width)
    # Every chunk at its full length, as `calibration.families.qwen3_omni` has it encoded; the other encoders mask
    # what pads a chunk, or pad it themselves.
    most, after_C = width, lengths_C
    for _ in range(_strides(encoder)):
        most = (most - 1) // 2 + 1
        after_C = torch.where(after_C > 0, (after_C - 1) // 2 + 1, 0)
    valid_CS = torch.arange(most, device=mask_AF.device)[None] < after_C[:, None]
    valid_indices = valid_CS.flatten().nonzero().squeeze(-1)
    made = {
        "padded_feature": chunks,
        "chunk_lengths": lengths_C,
        "valid_indices": valid_indices,
        "cu_seqlens": _windows(encoder, clips, per_clip, valid_CS)[valid_indices],
        "max_seqlen": 1,  # asked of windows' ends, which are not told
    }
    if not hasattr(encoder, "n_window_infer"):
        made["pool_indices"] = _pooled(after_C.reshape(clips, per_clip).sum(-1), valid_indices)
    return made


def _windows(encoder: Any, clips: int, per_clip: int, valid_CS: torch.Tensor) -> torch.Tensor:
    """The window of every position of every chunk; those of a clip are numbered apart from those of others."""
    width = 2 * int(encoder.n_window)
    chunks_per_window = int(encoder.n_window_infer) // width if hasattr(encoder, "n_window_infer") else 1
    clips_A1 = torch.arange(clips, device=valid_CS.device)[:, None]
    windows_1C = (torch.arange(per_clip, device=valid_CS.device) // chunks_per_window)[None]
    windows = (clips_A1 * per_clip + windows_1C).reshape(-1, 1)
    return windows.expand_as(valid_CS).flatten()


def _strides(encoder: Any) -> int:
    """How many convolutions halve the length: one in Qwen2.5-Omni, three in the others."""
    return 3 if hasattr(encoder, "conv2d3") else 1


def _pooled(after_A: torch.Tensor, valid_indices: torch.Tensor) -> torch.Tensor:
    """Packed positions at which pairs to be averaged begin; a clip's pairs begin anew, its odd last is dropped."""
    ends_A = after_A.cumsum(0)
    positions_T = torch.arange(valid_indices.shape[0], device=after_A.device)
    clip_T = (positions_T[:, None] >= ends_A[None]).sum(-1)
    local_T = positions_T - (ends_A - after_A)[clip_T]
    return ((local_T % 2 == 0) & (local_T + 1 < after_A[clip_T])).nonzero().squeeze(-1)


def _attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001 - an argument by its name; windows are told instead
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Queries, keys and values (1, H, T, W), the window of each position (T,) -> (1, T, H, W)."""
    same_TT = cu_seq_lens_q[:, None] == cu_seq_lens_q[None]
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(~same_TT, torch.finfo(scores.dtype).min)
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), None
