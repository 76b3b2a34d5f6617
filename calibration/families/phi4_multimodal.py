"""Phi-4-multimodal: its encoder adds its mask to the attention bias, where it hides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.families.clip_by_clip import ClipByClip

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class Phi4Multimodal(ClipByClip):
    """Clips are encoded one by one, as the model was given them in training."""

    model_types: ClassVar[tuple[str, ...]] = ("phi4_multimodal",)
    unmasked: ClassVar[str | None] = "audio_input_features"

    def decoder_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the decoder is called with, audio merged: here it does that itself, so it is told the result."""
        reached = super().decoder_inputs(inputs)
        decoder: Any = self.parts.decoder
        ids_BS = reached.pop("input_ids")
        seen = {name: reached.pop(name) for name in list(reached) if name.startswith(("audio_", "image_"))}
        embeds_BSD = decoder.embed_tokens(ids_BS)
        merged_BSD = decoder.embed_tokens_extend(ids_BS, embeds_BSD, **seen)
        return reached | {"inputs_embeds": merged_BSD}
