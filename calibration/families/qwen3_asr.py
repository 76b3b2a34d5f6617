"""Qwen3-ASR: how many frames its extractor finds in a clip depends on the longest clip beside it."""

from __future__ import annotations

from typing import ClassVar

from calibration.families.clip_by_clip import ClipByClip


class Qwen3Asr(ClipByClip):
    """Features are extracted clip by clip; the encoder masks what pads them."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_asr",)

    @property
    def max_audio_seconds(self) -> float | None:
        """None: the extractor's length is one to pad to, not a limit."""
        return None
