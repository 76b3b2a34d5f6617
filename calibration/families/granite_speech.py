"""Granite Speech: an encoder that does not mask padding, and a template that takes a turn as plain text."""

from __future__ import annotations

from typing import ClassVar

from calibration.families.clip_by_clip import ClipByClip


class GraniteSpeech(ClipByClip):
    """Its feature extractor needs torchaudio."""

    model_types: ClassVar[tuple[str, ...]] = ("granite_speech",)
    unmasked: ClassVar[str | None] = "input_features"
