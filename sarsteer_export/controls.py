"""Plans that are wrong on purpose: the negative controls of parity, and random directions to compare behaviour with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from calibration.plan import Add, Edit, Positions, Site, SteeringPlan

if TYPE_CHECKING:
    from collections.abc import Sequence


def wrong_plans(plan: SteeringPlan) -> dict[str, SteeringPlan]:
    """Plans that an engine must not agree with, by name; none of them does what `plan` does.

    Wrong sign, wrong positions, and wrong layer: every block edit some blocks further on. Where no such shift
    gives other edits (the same tensors in every block), every other edit is left out instead.
    """
    controls = {
        "wrong sign": [dataclasses.replace(edit, strength=-edit.strength) for edit in plan.edits],
        "wrong positions": [_other_positions(edit) for edit in plan.edits],
    }
    shifts = (
        [_shifted(edit, by, plan.num_layers) for edit in plan.edits] for by in range(1, plan.num_layers)
    )
    moved = next((edits for edits in shifts if not _same(edits, plan.edits)), None)
    if moved is not None:
        controls["wrong layer"] = moved
    elif len(plan.edits) > 1:
        controls["every other edit missing"] = list(plan.edits[::2])
    return {
        name: dataclasses.replace(plan, edits=tuple(edits))
        for name, edits in controls.items()
        if not _same(edits, plan.edits)
    }


def random_control(plan: SteeringPlan, seed: int) -> SteeringPlan:
    """The same edits along random directions: what steering of this size does whatever its direction.

    A vector becomes a Gaussian direction of its norm; a basis becomes a random orthonormal one of its rank, around
    the same mean. Layers, sites, positions and strengths stay. Equal seeds give equal directions.
    """
    random = np.random.default_rng(seed)
    edits = tuple(_randomised(edit, random, plan.hidden_size) for edit in plan.edits)
    told = {"random_control": {"of": plan.digest(), "seed": seed}}
    return dataclasses.replace(plan, edits=edits, provenance={**plan.provenance, **told})


def _randomised(edit: Edit, random: np.random.Generator, width: int) -> Edit:
    if isinstance(edit, Add):
        direction_D = random.standard_normal(width)
        length = np.linalg.norm(edit.vector.astype(np.float64)) / np.linalg.norm(direction_D)
        return dataclasses.replace(edit, vector=(direction_D * length).astype(np.float32))
    basis_DK = np.linalg.qr(random.standard_normal((width, edit.basis.shape[1])))[0]
    return dataclasses.replace(edit, basis=basis_DK.astype(np.float32))


def _same(edits: Sequence[Edit], others: Sequence[Edit]) -> bool:
    """Whether two lists hold the same edits, whatever their order."""
    rest = list(others)
    for edit in edits:
        if edit not in rest:
            return False
        rest.remove(edit)
    return not rest


def _other_positions(edit: Edit) -> Edit:
    other = Positions.LAST if edit.positions == Positions.ALL else Positions.ALL
    return dataclasses.replace(edit, positions=other)


def _shifted(edit: Edit, by: int, num_layers: int) -> Edit:
    if edit.site is Site.FINAL_NORM_OUTPUT:
        return edit
    return dataclasses.replace(edit, layer=(edit.layer + by) % num_layers)
