"""Prompts taken apart, and caches that are gone on from: what they hold, and when that cannot be done."""

from __future__ import annotations

import pytest
import torch

from calibration import continuation
from calibration.continuation import CannotContinueError, Prompts, common_length, fork
from calibration.lalm import Lalm, encode_requests


def test_how_much_rows_have_in_common() -> None:
    assert common_length([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert common_length([(1, 2)]) == 2
    assert common_length([(1,), (2,)]) == 0


def prompts_like(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]),
        **changed,
    }


def test_prompts_know_the_tokens_of_their_rows() -> None:
    assert Prompts.of(prompts_like()).tokens == ((5, 6), (7, 8, 9))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"token_type_ids": torch.zeros(2, 3)}, "token_type_ids has a value per token"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "not padded on the left"),
    ],
)
def test_prompts_of_which_no_part_can_be_run_alone(changed: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(CannotContinueError, match=reason):
        Prompts.of(prompts_like(**changed))


def test_caches_that_forget_are_not_gone_on_from(lalm: Lalm) -> None:
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    with pytest.raises(CannotContinueError, match="StaticCache as its cache"):
        fork(StaticCache(lalm.model.config.get_text_config(), max_cache_len=8))
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    with pytest.raises(CannotContinueError, match="layers of kind DynamicSlidingWindowLayer"):
        fork(cache)


def test_a_fork_leaves_its_cache_as_it_is(lalm: Lalm) -> None:
    inputs = encode_requests(lalm, ["please respond."], None)
    with torch.inference_mode():
        cache = lalm.model(**inputs, use_cache=True).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        lalm.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=fork(cache), use_cache=True)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_positions_that_depend_on_what_follows_are_seen() -> None:
    prompts = Prompts.of(prompts_like())
    moved = Prompts.of(prompts_like(position_ids=torch.tensor([[0, 1, 2], [0, 1, 2]])))
    with pytest.raises(CannotContinueError, match="positions of a prompt's beginning"):
        continuation.shared_lengths(prompts, moved, None)
