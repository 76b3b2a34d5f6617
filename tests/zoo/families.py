"""The families of models that are supported, each with a maker of a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import tiny_lalm
from tests.zoo import (
    flamingo,
    gemma4,
    glmasr,
    granite_speech,
    omni,
    phi4_multimodal,
    qwen3_asr,
    text_only,
    voxtral,
)


@dataclass(frozen=True)
class Family:
    """A family as its users call it, the class that is loaded, and the writer of a checkpoint into a folder.

    `save` calls `pytest.importorskip` for a package that the family needs and that may be missing.
    """

    name: str
    model: str
    save: Callable[[Path], Path]
    hears: bool = True

    @property
    def identifier(self) -> str:
        """The name in the names of tests."""
        return self.name.lower().replace(" ", "-")


FAMILIES: tuple[Family, ...] = (
    Family("Qwen2-Audio", "Qwen2AudioForConditionalGeneration", tiny_lalm.save_checkpoint),
    Family("Qwen2.5-Omni", "Qwen2_5OmniThinkerForConditionalGeneration", omni.save_qwen2_5),
    Family("Qwen3-Omni", "Qwen3OmniMoeThinkerForConditionalGeneration", omni.save_qwen3),
    Family("Voxtral", "VoxtralForConditionalGeneration", voxtral.save_checkpoint),
    Family("Audio Flamingo 3", "AudioFlamingo3ForConditionalGeneration", flamingo.save_audio_flamingo),
    Family("Music Flamingo", "MusicFlamingoForConditionalGeneration", flamingo.save_music_flamingo),
    Family("Granite Speech", "GraniteSpeechForConditionalGeneration", granite_speech.save_checkpoint),
    Family("Phi-4-multimodal", "Phi4MultimodalForCausalLM", phi4_multimodal.save_checkpoint),
    Family("Gemma 4", "Gemma4ForConditionalGeneration", gemma4.save_checkpoint),
    Family("GLM-ASR", "GlmAsrForConditionalGeneration", glmasr.save_checkpoint),
    Family("Qwen3-ASR", "Qwen3ASRForConditionalGeneration", qwen3_asr.save_checkpoint),
    Family("Qwen2 (text)", "Qwen2ForCausalLM", text_only.save_qwen2, hears=False),
    Family("Llama (text)", "LlamaForCausalLM", text_only.save_llama, hears=False),
)
