"""Qwen3-Omni: how many frames its extractor finds in a clip depends on the longest clip beside it."""

from __future__ import annotations

from typing import ClassVar

from calibration.families.clip_by_clip import ClipByClip


class Qwen3Omni(ClipByClip):
    """Features are extracted clip by clip; the encoder drops what pads them."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")

    @property
    def max_audio_seconds(self) -> float | None:
        """None: the processor does not cut clips; the extractor's length is one to pad to."""
        return None
