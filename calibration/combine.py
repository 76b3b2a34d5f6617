"""Several plans in one: what happens where they meet is said, never guessed."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from calibration.plan import Edit, Site, SteeringPlan

if TYPE_CHECKING:
    from collections.abc import Sequence


class CombineRule(str, Enum):
    """What is done where edits of several plans act on one tensor of the stream.

    `DISJOINT` refuses. `SEQUENCE` applies them in the order of the plans, each to the result of the one before:
    additions add up, a projection removes what earlier plans added in its subspace.
    """

    DISJOINT = "disjoint"
    SEQUENCE = "sequence"


def combine_plans(plans: Sequence[SteeringPlan], rule: CombineRule = CombineRule.DISJOINT) -> SteeringPlan:
    """One plan with the edits of all, in order; a single plan is returned as it is.

    Raises `InputError` for plans of different shapes or models and, under `DISJOINT`, naming the site where two
    plans meet. The output of a block and the input of the next are one tensor.
    """
    if not plans:
        raise InputError("no plan is given; expected at least one")
    if len(plans) == 1:
        return plans[0]
    first = plans[0]
    for number, plan in enumerate(plans[1:], start=2):
        if (plan.hidden_size, plan.num_layers) != (first.hidden_size, first.num_layers):
            raise InputError(
                f"plan {number} is for {plan.num_layers} blocks of width {plan.hidden_size}; the first is for "
                f"{first.num_layers} of width {first.hidden_size}"
            )
    fingerprints = {plan.model_fingerprint for plan in plans} - {None}
    if len(fingerprints) > 1:
        raise InputError(
            "the plans were made for different models: their fingerprints are "
            + ", ".join(sorted(str(fingerprint)[:12] for fingerprint in fingerprints))
        )
    if rule is CombineRule.DISJOINT:
        _check_disjoint(plans)
    provenance: dict[str, Any] = {
        "combined": {"rule": rule.value, "plans": [plan.digest() for plan in plans]},
        **({"model_fingerprint": fingerprints.pop()} if fingerprints else {}),
    }
    edits = tuple(edit for plan in plans for edit in plan.edits)
    return SteeringPlan(first.hidden_size, first.num_layers, edits, provenance)


def _check_disjoint(plans: Sequence[SteeringPlan]) -> None:
    owners: dict[tuple[str, int], int] = {}
    for number, plan in enumerate(plans, start=1):
        for edit in plan.edits:
            owner = owners.setdefault(_tensor(edit), number)
            if owner != number:
                raise InputError(
                    f"plans {owner} and {number} both edit {edit.site.value} of block {edit.layer}; to apply them one "
                    f"after the other, use --combine {CombineRule.SEQUENCE.value}"
                )


def _tensor(edit: Edit) -> tuple[str, int]:
    """A name for the tensor an edit acts on: what stands before a block, or behind the final norm."""
    if edit.site is Site.FINAL_NORM_OUTPUT:
        return ("final norm", 0)
    return ("before block", edit.layer + (edit.site is Site.BLOCK_OUTPUT))
