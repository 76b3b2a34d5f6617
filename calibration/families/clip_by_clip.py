"""Families whose features, or whose encoder, would let one clip of a batch change another's embeddings.

Dimensions: A clips, F feature frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Processor outputs with a value per token, which are padded on the left; the others are per frame or per clip."""


class ClipByClip(ModelAdapter):
    """Extracts features from each clip as if it were alone, then pads them, so that no clip shapes another.

    `unmasked`: the features that an encoder without a mask takes. Their padding is NaN, which the encoder never
    reads: it is run clip by clip on what is before it.
    """

    unmasked: ClassVar[str | None] = None

    def __init__(self, model: Any, processor: Any, names: Any = None) -> None:
        super().__init__(model, processor, names)
        if self.unmasked is not None and self.audio_parts is not None:
            run_clip_by_clip(self.audio_parts.encoder)

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        if audios is None:
            return super().process(texts, None)
        rows = [
            super(ClipByClip, self).process([text], [clip]) for text, clip in zip(texts, audios, strict=True)
        ]
        return {name: self._joined(name, [row[name] for row in rows]) for name in rows[0]}

    def _joined(self, name: str, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        longest = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
        fill: float = float("nan") if name == self.unmasked else 0
        if name == "input_ids":
            fill = self.tokenizer.pad_token_id
        whole = rows[0].new_full((sum(len(row) for row in rows), *longest), fill)
        first = 0
        for row in rows:
            place = [slice(first, first + len(row))]
            for size, most in zip(row.shape[1:], longest, strict=True):
                place.append(slice(most - size, most) if name in TOKEN_INPUTS else slice(0, size))
            whole[tuple(place)] = row
            first += len(row)
        return whole


class _AloneMixin:
    """What `run_clip_by_clip` puts before an encoder's own class."""

    def __call__(self, features_AFM: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run: Any = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return run(features_AFM, *args, **kwargs)
        frames_A = (~features_AFM[:, :, 0].isnan()).sum(dim=1).tolist()
        if min(frames_A) == features_AFM.shape[1]:
            return run(features_AFM, *args, **kwargs)
        outputs = [
            run(clip[None, :frames], *args, **kwargs)
            for clip, frames in zip(features_AFM, frames_A, strict=True)
        ]
        if isinstance(outputs[0], torch.Tensor):
            return _stacked(outputs)
        return type(outputs[0])(last_hidden_state=_stacked([output.last_hidden_state for output in outputs]))


def run_clip_by_clip(encoder: torch.nn.Module) -> None:
    """Make an encoder of features (A, F, M) run each clip without the frames that hold NaN, once per model.

    Its output is padded with zeros. A class before its own, not a wrapped `forward`: that survives a deep copy, and
    hooks that move weights between devices.
    """
    kind = type(encoder)
    if not issubclass(kind, _AloneMixin):
        encoder.__class__ = type(kind.__name__, (_AloneMixin, kind), {})


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
