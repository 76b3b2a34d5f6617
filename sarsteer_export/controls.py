"""Plans that are wrong on purpose: the negative controls of parity."""

from __future__ import annotations

import dataclasses

from calibration.plan import Edit, Positions, Site, SteeringPlan


def wrong_plans(plan: SteeringPlan) -> dict[str, SteeringPlan]:
    """Plans that an engine must not agree with, by name: wrong sign, wrong layer, wrong positions.

    The wrong-layer control is left out where no block edit can move, in a decoder of one block.
    """
    controls = {
        "wrong sign": _with(
            plan, [dataclasses.replace(edit, strength=-edit.strength) for edit in plan.edits]
        ),
        "wrong positions": _with(plan, [_other_positions(edit) for edit in plan.edits]),
    }
    moved = [_next_layer(edit, plan.num_layers) for edit in plan.edits]
    if any(new.layer != old.layer for new, old in zip(moved, plan.edits, strict=True)):
        controls["wrong layer"] = _with(plan, moved)
    return controls


def _with(plan: SteeringPlan, edits: list[Edit]) -> SteeringPlan:
    return dataclasses.replace(plan, edits=tuple(edits))


def _other_positions(edit: Edit) -> Edit:
    other = Positions.ALL if edit.positions is Positions.LAST else Positions.LAST
    return dataclasses.replace(edit, positions=other)


def _next_layer(edit: Edit, num_layers: int) -> Edit:
    if edit.site is Site.FINAL_NORM_OUTPUT:
        return edit
    return dataclasses.replace(edit, layer=(edit.layer + 1) % num_layers)
