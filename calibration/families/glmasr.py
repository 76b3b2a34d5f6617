"""GLM-ASR: its encoder takes whole windows, whatever is said in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray


class GlmAsr(ModelAdapter):
    """Text is padded to the longest of a batch, features to the length of a window."""

    model_types: ClassVar[tuple[str, ...]] = ("glmasr",)

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        prompts = self.prompts(texts, spoken=audios is not None)
        batch: Mapping[str, Any] = self.processor(
            text=prompts,
            audio=None if audios is None else list(audios),
            return_tensors="pt",
            text_kwargs={"padding": True, "padding_side": "left"},
            audio_kwargs={"padding": "max_length", "sampling_rate": self.sampling_rate},
        )
        return batch
