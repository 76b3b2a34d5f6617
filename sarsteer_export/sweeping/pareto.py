"""The Pareto front of a sweep: points that no other beats in both attack success and damage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sarsteer_export.evaluation.figures import KL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sarsteer_export.sweeping.points import Point

ATTACK_SUCCESS, BENIGN_ANSWERED = "attack_success", "benign_answered"


def damage(point: Point, figure: str) -> float:
    """How much harm a setting does by one figure, more being worse: `kl`, or benign requests that are not answered."""
    value = point.figures[figure].value
    return value if figure == KL else 1.0 - value


def pareto_front(points: Sequence[Point], figure: str) -> list[Point]:
    """The points, by rising damage, for which no other has less of one of both and no more of the other.

    Points that are equal in both are all on it. A damage that is not finite is on no front.
    """
    ordered = sorted(
        (point for point in points if math.isfinite(damage(point, figure))),
        key=lambda point: (damage(point, figure), point.figures[ATTACK_SUCCESS].value),
    )
    front: list[Point] = []
    for point in ordered:
        both = (damage(point, figure), point.figures[ATTACK_SUCCESS].value)
        last = (damage(front[-1], figure), front[-1].figures[ATTACK_SUCCESS].value) if front else None
        if last is None or both[1] < last[1] or both == last:
            front.append(point)
    return front
