"""Positions of a forward pass, and which are selected, in PyTorch: the eager half of `calibration/positions.py`.

Dimensions: B batch, S sequence of this forward pass, T past and present.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calibration.positions import PositionKind, Positions

if TYPE_CHECKING:
    from collections.abc import Callable


def position_ids(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) counted over attended tokens only; 0 at padding before the first of them."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def attended_tokens(attention_mask: Any) -> Any:
    """The mask (B, T) behind the causal masks (B, 1, S, T) of a decoder with several kinds of attention.

    Such a decoder is given them by kind; a token that any position of this pass attends to is no padding. Whatever
    else a decoder is given is returned as it is.
    """
    if not isinstance(attention_mask, dict) or "full_attention" not in attention_mask:
        return attention_mask
    causal_B1ST = attention_mask["full_attention"]
    if causal_B1ST is None:  # nothing is padding
        return None
    attended_B1ST = causal_B1ST if causal_B1ST.dtype == torch.bool else causal_B1ST == 0
    return attended_B1ST[:, 0].any(dim=1).long()


def last_attended(attention_mask_BT: torch.Tensor, sequence: int) -> torch.Tensor:
    """Mark the last attended position of this forward pass in each row: bool (B, S).

    The mask covers past and present; its last `sequence` columns are this pass. A row that attends to
    nothing here is marked nowhere.
    """
    window_BS = attention_mask_BT[:, -sequence:].bool()
    positions_S = torch.arange(sequence, device=window_BS.device)
    attended_BS = torch.where(window_BS, positions_S, -1)
    return attended_BS == attended_BS.amax(dim=1, keepdim=True).clamp(min=0)


def selected(
    positions: Positions,
    attention_mask_BT: torch.Tensor,
    sequence: int,
    prompt_lengths: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Mark the positions of this pass that `positions` selects: bool (B, S).

    `prompt_lengths` gives attended prompt tokens per row, int (B,); asked only where positions depend on it.
    """
    window_BS = attention_mask_BT[:, -sequence:].bool()
    if positions.kind is PositionKind.ALL:
        return torch.ones_like(window_BS)
    if positions.kind is PositionKind.LAST:
        return last_attended(attention_mask_BT, sequence)
    token_BS = attention_mask_BT.long().cumsum(-1)[:, -sequence:] - 1
    start_B1, stop_B1 = _bounds(positions, prompt_lengths)
    chosen_BS = window_BS & (token_BS >= start_B1)
    return chosen_BS if stop_B1 is None else chosen_BS & (token_BS < stop_B1)


def _bounds(
    positions: Positions, prompt_lengths: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor | int, torch.Tensor | int | None]:
    """The tokens from and up to which positions select, each a number or per row (B, 1)."""
    if positions.kind is PositionKind.RANGE:
        return positions.start, positions.stop
    prompt_B1 = prompt_lengths()[:, None]
    if positions.kind is PositionKind.PROMPT:
        return 0, prompt_B1
    if positions.kind is PositionKind.GENERATED:
        return prompt_B1, None
    assert positions.stop is not None  # noqa: S101 - `first:N` always has its N
    return prompt_B1 - 1, prompt_B1 - 1 + positions.stop
