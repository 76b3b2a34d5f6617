"""Music Flamingo: a clip is heard in windows, and the time of every window counts the windows before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

UNHEARD_FRAMES = 2
"""So many frames make no embedding: the encoder halves them, and then takes the mean of every two."""


class MusicFlamingo(ModelAdapter):
    """Its model counts a window without an embedding to the next clip, which then begins a window too late.

    Such a window, the end of a clip just behind a whole window, is cut off; no embedding changes by that.
    """

    model_types: ClassVar[tuple[str, ...]] = ("musicflamingo",)

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        return super().process(texts, None if audios is None else [self._heard(clip) for clip in audios])

    def _heard(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        extractor: Any = self.feature_extractor
        whole = clip.size - clip.size % int(extractor.chunk_length * self.sampling_rate)
        return clip[:whole] if whole and clip.size - whole <= UNHEARD_FRAMES * extractor.hop_length else clip
