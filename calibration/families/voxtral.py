"""Voxtral: its tokenizer is mistral-common's, which writes prompts itself and has no chat template to render."""

from __future__ import annotations

import base64
import io
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import soundfile

from calibration.errors import UnsupportedError
from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.architecture import Checkpoint


class Voxtral(ModelAdapter):
    """Clips go into the prompt as files; they are padded with silence to whole windows of 30 seconds, all heard."""

    model_types: ClassVar[tuple[str, ...]] = ("voxtral",)

    @classmethod
    def load_model(cls, checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
        """The model. Raises `UnsupportedError` at once when mistral-common, needed later, is not installed."""
        if find_spec("mistral_common") is None:
            raise UnsupportedError(
                f"model {checkpoint.folder}: its tokenizer needs the package mistral-common; "
                "install it with: pip install 'sarsteer-export[voxtral]'"
            )
        return super().load_model(checkpoint)

    @property
    def chat_template(self) -> str | None:
        """What stands for a template: who writes the prompts, in which version of the instruction format."""
        instruct = self.tokenizer.tokenizer.instruct_tokenizer
        return f"mistral-common {version('mistral-common')}, {type(instruct).__name__}"

    @property
    def max_audio_seconds(self) -> float | None:
        """None: a clip has as many windows as it needs."""
        return None

    def process(
        self, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
    ) -> Mapping[str, Any]:
        """The processor's model inputs of B user turns, padded on the left."""
        clips = [[] for _ in texts] if audios is None else [[self._file(clip)] for clip in audios]
        turns = [
            [{"role": "user", "content": [*clip, *([{"type": "text", "text": text}] if text else [])]}]
            for clip, text in zip(clips, texts, strict=True)
        ]
        batch: Mapping[str, Any] = self.processor.apply_chat_template(turns)
        return batch

    def _file(self, clip: NDArray[np.float32]) -> dict[str, str]:
        """A clip as content of a turn: a WAV file of float samples, which loses none of their bits."""
        file = io.BytesIO()
        soundfile.write(file, clip, self.sampling_rate, format="WAV", subtype="FLOAT")
        return {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
