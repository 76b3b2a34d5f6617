"""What an inspection found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inspection:
    """What was found: as JSON and as text."""

    content: dict[str, Any]
    text: str
