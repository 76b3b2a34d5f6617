"""The steering equations written out literally, position by position: what every implementation must equal.

Independent of `calibration.steered` and `graph_passes`: own hooks, own loops, float64 arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from calibration.plan import Add, Edit, Positions, Site, SteeringPlan


def edited(hidden_D: torch.Tensor, edit: Edit) -> torch.Tensor:
    h = hidden_D.double().numpy()
    if isinstance(edit, Add):
        h = h + edit.strength * edit.vector.astype(np.float64)
    else:
        U = edit.basis.astype(np.float64)
        mean = 0 if edit.mean is None else edit.mean.astype(np.float64)
        h = h - edit.strength * U @ (U.T @ (h - mean))
    return torch.from_numpy(h).to(hidden_D.dtype)


def chosen_positions(
    positions: Positions, attended_T: list[bool], sequence: int, prompt_length: int | None
) -> list[int]:
    """The positions of the last `sequence` columns that are edited in a row, counted one by one."""
    past = len(attended_T) - sequence
    tokens = [
        (column - past, sum(attended_T[:column])) for column in range(len(attended_T)) if attended_T[column]
    ]
    present = [(position, token) for position, token in tokens if position >= 0]
    if positions.value == "all":
        return list(range(sequence))
    if positions.value == "last":
        return [position for position, _ in present[-1:]]
    kind, *bounds = positions.value.split(":")
    if kind == "range":
        wanted = range(int(bounds[0]), int(bounds[1] or 10**9))
    else:
        assert prompt_length is not None
        wanted = {
            "prompt": range(prompt_length),
            "generated": range(prompt_length, 10**9),
            "first": range(prompt_length - 1, prompt_length - 1 + int((bounds or [1])[0])),
        }[kind]
    return [position for position, token in present if token in wanted]


def edit_positions(
    hidden_BSD: torch.Tensor, edit: Edit, mask_BT: torch.Tensor, prompt_lengths: Sequence[int] | None = None
) -> torch.Tensor:
    result = hidden_BSD.clone()
    batch, sequence, _ = hidden_BSD.shape
    for row in range(batch):
        length = None if prompt_lengths is None else prompt_lengths[row]
        chosen = chosen_positions(edit.positions, mask_BT[row].bool().tolist(), sequence, length)
        for position in chosen:
            result[row, position] = edited(hidden_BSD[row, position], edit)
    return result


@contextmanager
def literally_steered(
    blocks: Sequence[torch.nn.Module],
    final_norm: torch.nn.Module,
    plan: SteeringPlan,
    mask_BT: torch.Tensor,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Steer with one hook per edit, registered in the plan's order, for one forward pass under `mask_BT`."""

    def on_input(edit: Edit) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (edit_positions(args[0], edit, mask_BT, prompt_lengths), *args[1:]), kwargs

        return hook

    def on_output(edit: Edit) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit_positions(output[0], edit, mask_BT, prompt_lengths), *output[1:])
            return edit_positions(output, edit, mask_BT, prompt_lengths)

        return hook

    handles: list[Any] = []
    for edit in plan.edits:
        if edit.site is Site.BLOCK_INPUT:
            handles.append(blocks[edit.layer].register_forward_pre_hook(on_input(edit), with_kwargs=True))
        else:
            module = blocks[edit.layer] if edit.site is Site.BLOCK_OUTPUT else final_norm
            handles.append(module.register_forward_hook(on_output(edit)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
