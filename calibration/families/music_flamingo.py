"""Music Flamingo: it gives every embedding its time in its window, and fails at a window that has no embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

MAYBE_NOTHING_SECONDS = 0.1
"""A longer rest of a clip behind its last whole window always becomes an embedding; a shorter one is asked for."""


class MusicFlamingo(ModelAdapter):
    """Clips end with their last window that is heard: some milliseconds that become no embedding are left out."""

    model_types: ClassVar[tuple[str, ...]] = ("musicflamingo",)

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        return super().process(texts, None if audios is None else [self._heard(clip) for clip in audios])

    def _heard(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        window = int(self.sampling_rate * self.processor.feature_extractor.chunk_length)
        whole = clip.size // window * window
        rest = clip[whole:]
        if not whole or not rest.size or rest.size >= MAYBE_NOTHING_SECONDS * self.sampling_rate:
            return clip
        return clip if self.audio_token_count(rest) else clip[:whole]
