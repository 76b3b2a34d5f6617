"""Feature extractors of the Whisper kind, without the time that they spend on silence behind short clips.

They pad every clip to a window, 30 s and more, before they compute its spectrogram. All frames of the padding are
alike, so a window that holds the longest clip and a little silence is enough: its last frame stands for the rest.

Dimensions: B clips, M mel bins, F frames of the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

if TYPE_CHECKING:
    from transformers import BatchFeature

FEATURES, MASK = "input_features", "attention_mask"


def extract(extractor: Any, *args: Any, **kwargs: Any) -> Any:
    """What `extractor` returns: features (B, M, F) and their mask (B, F), computed in a short window where that is so.

    An extractor that is none of `WhisperFeatureExtractor`'s own, that adds noise or levels a clip over its whole
    window, is called as it is.
    """
    window = _window(extractor, *args, **kwargs)
    if window is None:
        return extractor(*args, **kwargs)
    short, whole = window
    settings = kwargs | {"padding": "max_length", "max_length": short, "pad_to_multiple_of": None}
    return _filled(extractor(*args, **settings), whole // extractor.hop_length)


def _window(extractor: Any, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
    """Samples of a window that is short but enough, and of the one that is asked for; None when it is to be so."""
    longest = _longest(args[0]) if len(args) == 1 else None
    if type(extractor) is not WhisperFeatureExtractor or longest is None:
        return None
    if extractor.dither != 0 or extractor.padding_value != 0 or kwargs.get("do_normalize"):
        return None
    padding, multiple = kwargs.get("padding", "max_length"), kwargs.get("pad_to_multiple_of") or 1
    if padding in ("max_length", True, "longest"):
        least = kwargs.get("max_length") or extractor.n_samples if padding == "max_length" else longest
    else:
        return None
    whole = -(-least // multiple) * multiple
    # The last frame must hear nothing of a clip, nor of the silence mirrored at the end of the window.
    frames = -(-(longest + 2 * extractor.n_fft) // extractor.hop_length)
    short = frames * extractor.hop_length
    return (short, whole) if short < whole else None


def _longest(clips: Any) -> int | None:
    """Samples of the longest clip; None when these are not arrays (samples,)."""
    found = clips if isinstance(clips, list | tuple) else [clips]
    if not found or not all(isinstance(clip, np.ndarray) and clip.ndim == 1 for clip in found):
        return None
    return max(int(clip.size) for clip in found)


def _filled(batch: BatchFeature, frames: int) -> BatchFeature:
    """Features whose last frame is repeated, and a mask that hides the repetitions."""
    features_BMF = batch[FEATURES]
    more = frames - features_BMF.shape[-1]
    if isinstance(features_BMF, torch.Tensor):
        batch[FEATURES] = torch.cat([features_BMF, features_BMF[..., -1:].expand(-1, -1, more)], dim=-1)
    else:
        batch[FEATURES] = np.pad(features_BMF, ((0, 0), (0, 0), (0, more)), mode="edge")
    if MASK in batch:
        mask_BF = batch[MASK]
        padded = torch.nn.functional.pad if isinstance(mask_BF, torch.Tensor) else _padded
        batch[MASK] = padded(mask_BF, (0, more))
    return batch


def _padded(mask_BF: np.ndarray[Any, Any], ends: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.pad(mask_BF, ((0, 0), ends))
