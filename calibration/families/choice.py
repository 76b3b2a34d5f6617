"""Which adapter drives which checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.families.gemma4 import Gemma4
from calibration.families.granite_speech import GraniteSpeech
from calibration.families.music_flamingo import MusicFlamingo
from calibration.families.phi4_multimodal import Phi4Multimodal
from calibration.families.qwen3_asr import Qwen3Asr
from calibration.families.qwen3_omni import Qwen3Omni
from calibration.families.voxtral import Voxtral
from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from calibration.architecture import Checkpoint

ADAPTERS: tuple[type[ModelAdapter], ...] = (
    Gemma4,
    GraniteSpeech,
    MusicFlamingo,
    Phi4Multimodal,
    Qwen3Asr,
    Qwen3Omni,
    Voxtral,
)
"""Adapters of families that need their own; every other model is driven by `ModelAdapter`."""


def adapter_for(checkpoint: Checkpoint) -> type[ModelAdapter]:
    """The adapter of a checkpoint's family, by `model_type`; the default where the family needs none."""
    for adapter in ADAPTERS:
        if checkpoint.model_type in adapter.model_types:
            return adapter
    return ModelAdapter
