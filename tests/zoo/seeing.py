"""What the checkpoints of omni models say of the processors that see, for processors saved without them."""

from __future__ import annotations

import json
from pathlib import Path


def declare(folder: Path, **kinds: str) -> None:
    """Name image and video processors (`image_processor="ClassName"`) in a saved processor, as checkpoints do."""
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {name: {f"{name}_type": kind} for name, kind in kinds.items()}
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
