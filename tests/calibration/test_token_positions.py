"""Masks of decoders with several kinds of attention, read back to the tokens that are no padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.masking_utils import create_causal_mask

from calibration.token_positions import attended_tokens
from tests.conftest import padded


def masks_of(mask_BS: torch.Tensor, *, attention: str) -> dict[str, torch.Tensor | None]:
    """The masks by kind that transformers makes for a prefill; the one of a window is not to be read."""
    config = Qwen2Config(attn_implementation=attention)
    batch, sequence = mask_BS.shape
    full = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(batch, sequence, 1),
        attention_mask=mask_BS,
        past_key_values=None,
        position_ids=torch.arange(sequence)[None],
    )
    nothing = torch.zeros(batch, 1, sequence, sequence, dtype=torch.bool)
    return {"sliding_attention": nothing, "full_attention": full}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_tokens_that_are_no_padding_are_found_in_the_masks_by_kind(side: str, attention: str) -> None:
    mask_BT = padded(side)
    found = attended_tokens(masks_of(mask_BT, attention=attention))
    if found is None:  # nothing is padding, and PyTorch makes the mask itself
        assert (side, attention) == ("none", "sdpa")
        return
    np.testing.assert_array_equal(found, mask_BT)


def test_other_masks_are_left_as_they_are() -> None:
    mask_BT = padded("left")
    assert attended_tokens(mask_BT) is mask_BT
    assert attended_tokens(None) is None
    other = {"some_attention": mask_BT}
    assert attended_tokens(other) is other
