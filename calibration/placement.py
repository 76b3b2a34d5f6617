"""On which devices a model lies: on one, or spread over several by accelerate, parts of it perhaps on disk."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from calibration.errors import InputError, UnsupportedError

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads a model by itself."""


def check_device_map(device_map: str | dict[str, Any]) -> None:
    """Raise unless a model can be spread that way here: `UnsupportedError` without accelerate."""
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise InputError(f"device map is {device_map!r}; expected one of {', '.join(DEVICE_MAPS)}")
    if find_spec("accelerate") is None:
        raise UnsupportedError(
            "a device map needs accelerate, which is not installed; pip install 'sarsteer-export[accelerate]'"
        )


def input_device(model: Any) -> torch.device:
    """Where a model's inputs go: to the device of its token embedding, or where accelerate brings its weights to."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = next(iter(embedding.parameters()), None) if isinstance(embedding, torch.nn.Module) else None
    device: torch.device = model.device if weight is None else weight.device
    if device.type != "meta":
        return device
    hook = getattr(embedding, "_hf_hook", None)  # its weights are elsewhere until it is called
    execution = getattr(hook, "execution_device", None)
    if execution is None:
        raise InputError(
            f"{type(model).__name__} lies on the meta device, without weights; load it on a device or with a device map"
        )
    return torch.device(execution)
