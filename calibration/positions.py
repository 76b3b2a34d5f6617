"""At which positions of a forward pass an edit acts; `docs/plan.md` defines every kind. Needs nothing but Python.

Positions count attended tokens, row by row: token i of a row is the i-th one, from 0, that its attention mask
attends to, past included. A row's prompt is its first p tokens, what was generated is the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from calibration.errors import InputError

COUNT = r"(0|[1-9][0-9]{0,8})"
GRAMMAR = "last, all, prompt, generated, first:N, range:A:B or range:A:"


class PositionKind(str, Enum):
    """The kinds of positions an edit can act at."""

    LAST = "last"
    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
    FIRST = "first"
    RANGE = "range"


@dataclass(frozen=True)
class Positions:
    """Positions of a forward pass; `value` is how a plan writes them.

    `start`, `stop`: for `FIRST` the number of steps (in `stop`), for `RANGE` the tokens A ≤ i < B; a `stop`
    of None is open. Unused otherwise. Raises `InputError` for bounds that select nothing.
    """

    LAST: ClassVar[Positions]
    ALL: ClassVar[Positions]
    PROMPT: ClassVar[Positions]
    GENERATED: ClassVar[Positions]

    kind: PositionKind
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        bounded = self.kind in (PositionKind.FIRST, PositionKind.RANGE)
        if not bounded and (self.start, self.stop) != (0, None):
            raise InputError(f"positions {self.kind.value!r} take no bounds; got {self.start}, {self.stop}")
        if self.kind is PositionKind.FIRST and (self.start != 0 or self.stop is None or self.stop < 1):
            raise InputError(
                f"positions 'first:{self.stop}' select no step; expected first:N with N at least 1"
            )
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise InputError(f"positions {self.value!r} select no token; expected range:A:B with 0 <= A < B")

    @classmethod
    def first(cls, steps: int) -> Positions:
        """The last position of the prefill and of each decode step, in the first `steps` generation steps."""
        return cls(PositionKind.FIRST, stop=steps)

    @classmethod
    def range(cls, start: int, stop: int | None = None) -> Positions:
        """Tokens `start` to `stop` − 1 of each row; without `stop`, all from `start` on."""
        return cls(PositionKind.RANGE, start, stop)

    @classmethod
    def parse(cls, text: object, where: str = "positions") -> Positions:
        """Read positions as a plan writes them. Raises `InputError`, which begins with `where`, for all else."""
        if isinstance(text, str):
            for known in (cls.LAST, cls.ALL, cls.PROMPT, cls.GENERATED):
                if text == known.value:
                    return known
            if match := re.fullmatch(f"first:{COUNT}", text):
                return cls.first(int(match[1]))
            if match := re.fullmatch(f"range:{COUNT}:{COUNT}?", text):
                return cls.range(int(match[1]), int(match[2]) if match[2] else None)
        raise InputError(f"{where} is {text!r}; known are {GRAMMAR}")

    @property
    def value(self) -> str:
        """How a plan writes these positions."""
        if self.kind is PositionKind.FIRST:
            return f"first:{self.stop}"
        if self.kind is PositionKind.RANGE:
            return f"range:{self.start}:{'' if self.stop is None else self.stop}"
        return str(self.kind.value)

    @property
    def counts_tokens(self) -> bool:
        """Whether these positions depend on a token's number in its row."""
        return self.kind not in (PositionKind.LAST, PositionKind.ALL)

    @property
    def needs_prompt_length(self) -> bool:
        """Whether these positions depend on where a row's prompt ends."""
        return self.counts_tokens and self.kind is not PositionKind.RANGE


Positions.LAST = Positions(PositionKind.LAST)
Positions.ALL = Positions(PositionKind.ALL)
Positions.PROMPT = Positions(PositionKind.PROMPT)
Positions.GENERATED = Positions(PositionKind.GENERATED)
