"""Prompts that are run on from the KV cache of what they have in common, and when that cannot be done.

Prompts come left-padded, as `encode_requests` makes them. What is run on from a cache is padded on the left again,
between cache and tokens, so that the last column is every row's last token; the attention mask has the hole.

Dimensions: B batch, T a whole prompt, P columns of a cache, S columns of one pass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
"""Model inputs with a column per token that a continued pass is given; the others belong to the audio."""


class CannotContinueError(Exception):
    """These prompts cannot be run on from a cache; the message says why. They are run in full instead."""


@dataclass(frozen=True)
class Prompts:
    """B encoded prompts: the model's inputs and, row by row, the ids of attended tokens.

    Raises `CannotContinueError` where inputs are not such that a part of their columns can be run alone.
    """

    inputs: dict[str, torch.Tensor]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, inputs: dict[str, torch.Tensor]) -> Prompts:
        """Look at encoded requests."""
        if "input_ids" not in inputs:
            raise CannotContinueError("its inputs are embeddings, without the tokens that they stand for")
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        if other := [
            name
            for name, value in inputs.items()
            if name not in TEXT_INPUTS and value.shape[:2] == ids_BT.shape and value.ndim == 2
        ]:
            raise CannotContinueError(f"the input {other[0]} has a value per token")
        lengths = mask_BT.sum(dim=1).tolist()
        columns = ids_BT.shape[1]
        if not all(bool(row[columns - length :].all()) for row, length in zip(mask_BT, lengths, strict=True)):
            raise CannotContinueError("prompts are not padded on the left")
        rows = ids_BT.tolist()
        return cls(inputs, tuple(tuple(row[columns - n :]) for row, n in zip(rows, lengths, strict=True)))

    @property
    def audio(self) -> dict[str, torch.Tensor]:
        """The inputs that belong to clips."""
        return {name: value for name, value in self.inputs.items() if name not in TEXT_INPUTS}

    def positions(self, row: int, first: int, last: int) -> torch.Tensor:
        """Position ids (..., last − first) of tokens `first` to `last` of a row."""
        columns = self.inputs["input_ids"].shape[1]
        start = columns - len(self.tokens[row])
        return self.inputs["position_ids"][..., row, start + first : start + last]


@dataclass(frozen=True)
class Past:
    """A KV cache of P columns, and which of them each row attends to (B, P)."""

    cache: Any
    mask_BP: torch.Tensor


def fork(cache: Any) -> Any:
    """A cache that goes on from this one and leaves it as it is; tensors are shared.

    Raises `CannotContinueError` for caches whose layers forget, overwrite or keep a running state.
    """
    if not isinstance(cache, DynamicCache):
        raise CannotContinueError(f"the decoder returned {type(cache).__name__} as its cache")
    if other := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
        raise CannotContinueError(f"its cache has layers of kind {', '.join(sorted(other))}")
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def for_rows(past: Past, rows: int) -> Past:
    """The cache of one row, as that of `rows` equal ones."""
    cache = fork(past.cache)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return Past(cache, past.mask_BP.expand(rows, -1))


def without_last_column(past: Past) -> Past:
    """The cache before its last token."""
    cache = fork(past.cache)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    return Past(cache, past.mask_BP[:, :-1])


def up_to(past: Past, lengths: Sequence[int]) -> Past:
    """The cache of each row's first tokens; what comes behind them is not attended to."""
    counted_BP = past.mask_BP.long().cumsum(-1)
    limit_B1 = torch.tensor(lengths, device=counted_BP.device)[:, None]
    return Past(fork(past.cache), past.mask_BP * (counted_BP <= limit_B1))


def rest_of(prompts: Prompts, lengths: Sequence[int], past: Past | None) -> dict[str, Any]:
    """Model inputs (B, S) of what comes behind each row's first tokens, `lengths` of which are in the cache."""
    widths = [len(row) - length for row, length in zip(prompts.tokens, lengths, strict=True)]
    width = max(widths)
    ids_BS = prompts.inputs["input_ids"][:, -width:]
    columns_S = torch.arange(width, device=ids_BS.device)
    wanted_BS = columns_S >= width - torch.tensor(widths, device=ids_BS.device)[:, None]
    # A column that is not attended to must hold some token; a row's last one stands for no audio.
    filled_BS = torch.where(wanted_BS, ids_BS, ids_BS[:, -1:])
    mask_BS = wanted_BS.to(prompts.inputs["attention_mask"].dtype)
    if past is None:
        mask_BT, cache = mask_BS, None
    else:
        mask_BT, cache = torch.cat([past.mask_BP.to(mask_BS), mask_BS], dim=1), past.cache
    return {
        "input_ids": filled_BS,
        "attention_mask": mask_BT,
        "position_ids": prompts.inputs["position_ids"][..., -width:],
        **({} if cache is None else {"past_key_values": cache}),
    }


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    shortest = min(len(row) for row in rows)
    return next((n for n in range(shortest) if first[n] != last[n]), shortest)


def shared_lengths(prompts: Prompts, longer: Prompts, audio_token: int | None) -> list[int]:
    """How many tokens of each row of `longer` are in the cache of `prompts`: at most all but one.

    Raises `CannotContinueError` where audio comes behind them, or the same token has another position.
    """
    lengths = []
    for row, (tokens, others) in enumerate(zip(prompts.tokens, longer.tokens, strict=True)):
        length = min(common_length([tokens, others]), len(others) - 1)
        if audio_token in others[length:]:
            raise CannotContinueError("text comes before the audio in its prompts")
        if not torch.equal(prompts.positions(row, 0, length), longer.positions(row, 0, length)):
            raise CannotContinueError("positions of a prompt's beginning depend on what comes behind it")
        lengths.append(length)
    return lengths
