"""What is compared side by side: the undefended model, each plan, and random directions as large as each plan's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from calibration.errors import InputError
from sarsteer_export.controls import random_control

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.plan import SteeringPlan

UNDEFENDED = "undefended"
RANDOM_PREFIX = "random, "


class SystemKind(str, Enum):
    """How a system is steered."""

    UNDEFENDED = "undefended"
    STEERED = "steered"
    RANDOM = "random control"


@dataclass(frozen=True)
class LabelledPlan:
    """A plan and what reports call it."""

    label: str
    plan: SteeringPlan


@dataclass(frozen=True)
class System:
    """One row of the report: a model steered by no plan, by one, or by each of several random controls in turn.

    `plans`: what is asked, one after another; figures are means over them, prompt by prompt.
    """

    name: str
    kind: SystemKind
    plans: tuple[SteeringPlan | None, ...]


def systems_of(plans: Sequence[LabelledPlan], seeds: Sequence[int]) -> tuple[System, ...]:
    """The undefended system, then every plan, then its random controls. Raises `InputError` for labels used twice."""
    names = [UNDEFENDED]
    for plan in plans:
        if plan.label in names or plan.label.startswith(RANDOM_PREFIX):
            raise InputError(
                f"the label {plan.label!r} is taken; give each --plan one of its own, as LABEL=FILE"
            )
        names.append(plan.label)
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError(f"random seeds are {list(seeds)}; expected different numbers of at least 0")
    steered = [System(given.label, SystemKind.STEERED, (given.plan,)) for given in plans]
    controls = [
        System(
            RANDOM_PREFIX + given.label,
            SystemKind.RANDOM,
            tuple(random_control(given.plan, seed) for seed in seeds),
        )
        for given in plans
        if seeds
    ]
    return (System(UNDEFENDED, SystemKind.UNDEFENDED, (None,)), *steered, *controls)
