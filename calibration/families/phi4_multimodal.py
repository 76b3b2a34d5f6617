"""Phi-4-multimodal: its encoder adds its mask to the attention bias, where it hides nothing."""

from __future__ import annotations

from typing import ClassVar

from calibration.families.clip_by_clip import ClipByClip


class Phi4Multimodal(ClipByClip):
    """Clips are encoded one by one, as the model was given them in training."""

    model_types: ClassVar[tuple[str, ...]] = ("phi4_multimodal",)
    unmasked: ClassVar[str | None] = "audio_input_features"
