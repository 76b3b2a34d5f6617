"""Which requests are run together: those of like length, so that little of a batch is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

FIRST_PAIRS = 2
"""Requests of the very first batch: the longest and the shortest. Whole passes are compared with on it."""


@dataclass(frozen=True)
class Batch:
    """Requests that are run together, by their numbers in the harmful or the benign set."""

    harmful: bool
    rows: tuple[int, ...]


def plan_batches(
    harmful: Sequence[int], benign: Sequence[int], *, size: int, done: tuple[Set[int], Set[int]]
) -> list[Batch]:
    """Batches over requests of the given lengths, longest first, without those that are done.

    Longest first, because what does not fit in memory fails at once, and the time left is not underestimated.
    """
    batches = []
    for is_harmful, lengths, over in ((True, harmful, done[0]), (False, benign, done[1])):
        rows = sorted(set(range(len(lengths))) - over, key=lambda row: (-lengths[row], row))
        if is_harmful and rows:
            first = rows[:1] if len(rows) < FIRST_PAIRS or size < FIRST_PAIRS else [rows[0], rows[-1]]
            batches.append(Batch(True, tuple(first)))
            rows = [row for row in rows if row not in first]
        batches += [
            Batch(is_harmful, tuple(rows[start : start + size])) for start in range(0, len(rows), size)
        ]
    return batches
