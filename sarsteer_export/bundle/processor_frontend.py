"""From a clip and a text to what the graphs read, by the model's own processor. Imports torch and transformers.

Models whose processor does more than Qwen2-Audio's, chunks and expansion of the audio token among it, keep its files
in the bundle; the adapter that drove it in calibration drives it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ProcessorFrontend:
    """The processor in a bundle's `folder`. `adapter`: the name of the class that drives it.

    `audio_token`: the id of the token that stands for one audio embedding, or None for a text-only model.
    """

    folder: Path
    adapter: str
    audio_token: int | None

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of clips in Hz."""
        return int(self._adapter.sampling_rate)

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest clip the model hears whole, or None when it has no limit."""
        limit: float | None = self._adapter.max_audio_seconds
        return limit

    def inputs(self, text: str, clip: NDArray[np.float32] | None) -> dict[str, NDArray[Any]]:
        """The processor's inputs of one user turn: `input_ids` (1, S), the audio token expanded, and of the clip.

        Raises `InputError` when the text holds the audio token.
        """
        made = self._adapter.encode([text], None if clip is None else [clip])
        return {name: value.numpy() for name, value in made.items()}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, special ones left out."""
        text: str = self._adapter.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @cached_property
    def _adapter(self) -> Any:
        import torch

        from calibration.architecture import Checkpoint
        from calibration.checkpoint import read_config

        kind = adapter_named(self.adapter)
        if kind is None:
            raise UnsupportedError(
                f"{self.folder}: its processor is driven by the adapter {self.adapter}, which this package does not "
                "have; drive the bundle's graphs with code of your own"
            )
        checkpoint = Checkpoint(self.folder, read_config(self.folder), torch.float32)
        try:
            processor = kind.load_processor(checkpoint)
        except Exception as error:  # a damaged file surfaces as almost any exception of the libraries below
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.folder}: its processor cannot be loaded ({reason})") from error
        # There is no model here. The adapter asks its configuration for the audio token, and else its processor; made
        # by hand, it does not prepare a model for being run.
        adapter = object.__new__(kind)
        config = SimpleNamespace(audio_token_id=self.audio_token)
        adapter.model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)
        adapter.processor, adapter.names = processor, None
        return adapter


def adapter_named(name: str) -> Any | None:
    """The adapter class of this package that has that name, or None."""
    from calibration.families.choice import ADAPTERS
    from calibration.model_adapter import ModelAdapter

    kinds: tuple[type[ModelAdapter], ...] = (ModelAdapter, *ADAPTERS)
    return next((kind for kind in kinds if kind.__name__ == name), None)
