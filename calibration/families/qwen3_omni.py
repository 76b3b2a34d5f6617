"""Qwen3-Omni: its extractor and its encoder would let the longest clip of a batch shape the others.

Dimensions: C chunks, M mel bins, F feature frames of all clips.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calibration.families.clip_by_clip import ClipByClip

if TYPE_CHECKING:
    from calibration.decoder_parts import PartNames


class Qwen3Omni(ClipByClip):
    """Features are extracted clip by clip, and every chunk of them is encoded at its full length."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")

    def __init__(self, model: Any, processor: Any, names: PartNames | None = None) -> None:
        super().__init__(model, processor, names)
        assert self.audio_parts is not None  # noqa: S101 - a thinker without an encoder does not load
        hooks = self.audio_parts.encoder._forward_pre_hooks
        if whole_chunks not in hooks.values():
            self.audio_parts.encoder.register_forward_pre_hook(whole_chunks, with_kwargs=True)

    @property
    def max_audio_seconds(self) -> float | None:
        """None: the processor does not cut clips; the extractor's length is one to pad to."""
        return None


def whole_chunks(
    encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the encoder runs: pad its chunks to `2 * n_window` frames instead of to the longest of this batch.

    The convolutions read what pads a chunk. A clip shorter than a chunk would otherwise come out differently
    alone and beside a longer one.
    """
    features_MF = args[0] if args else kwargs["input_features"]
    clip_frames = kwargs["feature_lens"]
    steps = sys.modules[type(encoder).__module__]  # the functions that this encoder itself calls
    chunk = 2 * encoder.n_window
    padded_CMF, chunk_frames_C = steps.chunk_and_pad_features(features_MF, clip_frames, encoder.n_window)
    padded_CMF = torch.nn.functional.pad(padded_CMF, (0, chunk - padded_CMF.shape[-1]))
    whole = chunk_frames_C.new_tensor([chunk])
    beside_whole = steps.get_valid_indices(torch.cat([chunk_frames_C, whole]), encoder.n_window)
    of_whole = len(steps.get_valid_indices(whole, encoder.n_window))
    windows = steps.get_audio_cu_seqlens(whole, clip_frames, encoder.n_window_infer, encoder.n_window)
    told = {"padded_feature": padded_CMF, "chunk_lengths": chunk_frames_C}
    return args, kwargs | told | {"valid_indices": beside_whole[:-of_whole], "cu_seqlens": windows}
