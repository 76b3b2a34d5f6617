"""Phi-4-multimodal: its encoder adds its mask to the attention bias, where it hides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.families.clip_by_clip import ClipByClip

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

AUDIO_INPUTS = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


class Phi4Multimodal(ClipByClip):
    """Clips are encoded one by one, as the model was given them in training."""

    model_types: ClassVar[tuple[str, ...]] = ("phi4_multimodal",)
    unmasked: ClassVar[str | None] = "audio_input_features"

    def decoder_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the decoder is called with once audio is merged, which this decoder does itself."""
        decoder: Any = self.parts.decoder
        ids = inputs["input_ids"]
        audio = {name: inputs[name] for name in AUDIO_INPUTS if name in inputs}
        merged = decoder.embed_tokens_extend(ids, decoder.embed_tokens(ids), **audio)
        rest = {name: value for name, value in inputs.items() if name not in (*AUDIO_INPUTS, "input_ids")}
        return {**rest, "inputs_embeds": merged}
