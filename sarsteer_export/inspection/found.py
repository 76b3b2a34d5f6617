"""What an inspection found."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inspection:
    """What was found: as JSON and as text."""

    content: dict[str, Any]
    text: str


def alike(prefix: str, entries: dict[str, str]) -> list[str]:
    """A line per run of entries that say the same: a decoder has dozens of cache inputs."""
    lines = []
    for text, run in itertools.groupby(entries, key=lambda name: entries[name]):
        names = list(run)
        shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{prefix}{shown}: {text}")
    return lines
