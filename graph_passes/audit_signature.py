"""What a step does to the stream, as an audit compares it: by operator and expression, whatever anything is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graph_passes.expressions import Expressions, Leaves, digest_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

HIDDEN = "the stream before this step"
"""Stands in expressions for what a step is given."""


@dataclass(frozen=True)
class Signature:
    """What a step does to whatever it is given: the operator, its change as an expression, the constants in that."""

    op: str
    change: str
    constants: tuple[NDArray[Any], ...] = field(compare=False, default=())

    def __str__(self) -> str:
        """The step as a report says it."""
        norms = ", ".join(
            f"{list(values.shape)} of norm {np.linalg.norm(values.astype(np.float64)):.4g}"
            for values in self.constants
        )
        kind = "an addition" if self.op.startswith("Add") else "a subtraction"
        return f"{kind} of constants {norms}" if norms else f"{kind} without constants"

    def has_constants_of(self, other: Signature) -> bool:
        """Whether both are computed from the same constants to the bit, at least one."""
        digests = [sorted(digest_of(values) for values in each.constants) for each in (self, other)]
        return bool(self.constants) and digests[0] == digests[1]

    def distance(self, other: Signature) -> float | None:
        """The largest difference between constants of two steps; None where these are not of the same shapes."""
        pairs = list(zip(self.constants, other.constants, strict=False))
        if not pairs or any(one.shape != another.shape for one, another in pairs):
            return None
        return max(
            float(np.abs(one.astype(np.float64) - another.astype(np.float64)).max()) for one, another in pairs
        )


def signature_of(
    expressions: Expressions, op: str, hidden: str, change: str, stream: Collection[str]
) -> Signature:
    """The signature of the step `hidden` `op` `change`; of the tensors `stream` only the shape counts."""
    leaves = Leaves({expressions.root(hidden): HIDDEN}, stream)
    constants = expressions.constants_of(change, leaves)
    return Signature(op, expressions.of(change, leaves), tuple(constants))


def matched(expected: Sequence[Signature], found: Sequence[Signature]) -> Mapping[int, int]:
    """Which expected step is which found one: the longest common subsequence."""
    lengths = [[0] * (len(found) + 1) for _ in range(len(expected) + 1)]
    for one in reversed(range(len(expected))):
        for other in reversed(range(len(found))):
            lengths[one][other] = (
                lengths[one + 1][other + 1] + 1
                if expected[one] == found[other]
                else max(lengths[one + 1][other], lengths[one][other + 1])
            )
    pairs, one, other = {}, 0, 0
    while one < len(expected) and other < len(found):
        if expected[one] == found[other]:
            pairs[one] = other
            one, other = one + 1, other + 1
        elif lengths[one + 1][other] >= lengths[one][other + 1]:
            one += 1
        else:
            other += 1
    return pairs
