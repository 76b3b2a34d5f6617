"""What of a plan a foreign format can hold, and what becomes of the rest: never dropped unless that was said.

Dimensions: D width, L decoder blocks; boundaries as in `vectors`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Edit, Positions, Site, SteeringPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 6
"""Most edits that a message lists."""


@dataclass(frozen=True)
class Holding:
    """What a format holds: additions at `site` of layers `first` to L − 1, at all positions.

    `program` applies the files; `elsewhere`: how one makes it act at other positions, where one can.
    """

    name: str
    program: str
    site: Site
    first: int = 0
    elsewhere: str = ""

    @property
    def holds_block_0(self) -> bool:
        """Whether every edit before, in or behind block 0 has a place."""
        return self.site is Site.BLOCK_INPUT and self.first == 0

    @property
    def holds_last_block(self) -> bool:
        """Whether every edit behind the last block has a place."""
        return self.site is Site.BLOCK_OUTPUT


@dataclass(frozen=True)
class AllowedLosses:
    """What a user allows to be lost: the positions of edits; edits at either end that the format cannot hold."""

    all_positions: bool = False
    drop_block_0: bool = False
    drop_last_block: bool = False


@dataclass(frozen=True)
class Fitted:
    """The part of a plan that a format holds: layer in the format's numbering -> (D,) float32, and what changed."""

    by_layer: dict[int, NDArray[np.float32]]
    notes: tuple[str, ...]


def fit(plan: SteeringPlan, holding: Holding, allowed: AllowedLosses) -> Fitted:
    """The vectors of `plan` as `holding` holds them, strengths multiplied in.

    Raises `UnsupportedError` for every edit that cannot be held, all of them in one message.
    """
    notes: list[str] = []
    additions = _additions(plan, holding)
    notes += _positions(additions, holding, allowed)
    kept: dict[int, list[Add]] = defaultdict(list)
    before, behind, moved = [], [], []
    for edit in additions:
        layer = _boundary(edit) - (1 if holding.site is Site.BLOCK_OUTPUT else 0)
        if layer < holding.first:
            before.append(edit)
        elif layer >= plan.num_layers:
            behind.append(edit)
        else:
            kept[layer].append(edit)
            if edit.site is not holding.site:
                moved.append(edit)
    notes += _ends(before, behind, plan, holding, allowed)
    if not kept:
        raise UnsupportedError(f"{holding.name} can hold none of the plan's {len(plan.edits)} edits")
    if moved:
        there = "returns" if holding.site is Site.BLOCK_OUTPUT else "reads"
        notes.append(
            f"{_listed(moved)}: written as what the neighbouring block {there}, which is the same tensor"
        )
    if merged := [layer for layer, edits in kept.items() if len(edits) > 1]:
        notes.append(
            f"the edits at layers {', '.join(map(str, sorted(merged)))} were summed into one vector each"
        )
    return Fitted({layer: _summed(layer, kept[layer]) for layer in sorted(kept)}, tuple(notes))


def _additions(plan: SteeringPlan, holding: Holding) -> list[Add]:
    foreign = [
        edit for edit in plan.edits if not isinstance(edit, Add) or edit.site is Site.FINAL_NORM_OUTPUT
    ]
    if foreign:
        raise UnsupportedError(
            f"{holding.name} holds nothing but vectors that are added between blocks; the plan has {_listed(foreign)}; "
            "use a plan without them"
        )
    return [edit for edit in plan.edits if isinstance(edit, Add)]


def _positions(edits: list[Add], holding: Holding, allowed: AllowedLosses) -> list[str]:
    narrow = [edit for edit in edits if edit.positions != Positions.ALL]
    if not narrow:
        return []
    kinds = ", ".join(sorted({edit.positions.value for edit in narrow}))
    what = (
        f"{holding.name} says nothing of positions and {holding.program} adds its vectors at every one, the whole "
        f"prompt included; {len(narrow)} edits of the plan act at {kinds}"
    )
    if not allowed.all_positions:
        raise UnsupportedError(
            f"{what}: that is another steering, and far stronger; --allow-all-positions writes it all the same"
        )
    return [f"{what}: what was written is another steering, far stronger{holding.elsewhere}"]


def _ends(
    before: list[Add], behind: list[Add], plan: SteeringPlan, holding: Holding, allowed: AllowedLosses
) -> list[str]:
    notes = []
    for edits, drop, flag, reason in (
        (before, allowed.drop_block_0, "--drop-block-0", _reason_before(holding)),
        (
            behind,
            allowed.drop_last_block,
            "--drop-last-block",
            f"its vectors are added to what a block reads, and no block reads what block {plan.num_layers - 1} returns",
        ),
    ):
        if edits and not drop:
            raise UnsupportedError(
                f"{holding.name} cannot hold {_listed(edits)}: {reason}; {flag} writes the file without"
            )
        if edits:
            notes.append(f"{_listed(edits)} dropped: {reason}")
    return notes


def _reason_before(holding: Holding) -> str:
    if holding.first:
        return f"its layers count from {holding.first}, and layer n is added to what block n, from 0, returns"
    return "its vectors are added to what a block returns, and no block returns what block 0 reads"


def _boundary(edit: Add) -> int:
    return edit.layer + (1 if edit.site is Site.BLOCK_OUTPUT else 0)


def _summed(layer: int, edits: list[Add]) -> NDArray[np.float32]:
    """The sum of strength · vector; each product in float32, as a plan defines it."""
    scaled_ED = np.stack([np.float32(edit.strength) * edit.vector for edit in edits])
    with np.errstate(over="ignore"):
        total_D: NDArray[np.float32] = scaled_ED.sum(axis=0, dtype=np.float64).astype(np.float32)
    if not np.isfinite(total_D).all():
        raise InputError(f"the edits at layer {layer} sum to more than float32 holds; lower their strengths")
    return total_D


def _listed(edits: list[Add] | list[Edit]) -> str:
    shown = [f"{edit.op} at {edit.site.value} of block {edit.layer}" for edit in edits[:SHOWN]]
    rest = f" and {len(edits) - SHOWN} more" if len(edits) > SHOWN else ""
    return ", ".join(shown) + rest
