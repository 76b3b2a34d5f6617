"""From a clip and a prompt to what the graphs read, without torch: chat template, tokens, log-mel features.

Dimensions: A clips, M mel bins, F feature frames.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from calibration.errors import InputError, UnsupportedError
from sarsteer_export.bundle.manifest import CHAT_TEMPLATE, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jinja2 import Template
    from numpy.typing import NDArray

SUPPORTED_EXTRACTOR = "WhisperFeatureExtractor"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Frontend:
    """The processor of a bundle: `folder` holds tokenizer, chat template and feature extractor settings.

    `hears`: whether the model takes audio; a text-only model has no feature extractor.
    """

    folder: Path
    hears: bool = True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        try:
            return Tokenizer.from_file(str(self.folder / TOKENIZER))
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"{self.folder / TOKENIZER}: not a readable tokenizer ({error})") from error

    @cached_property
    def extractor(self) -> dict[str, Any]:
        """The feature extractor's settings. Raises `UnsupportedError` for another kind than Whisper's."""
        path = self.folder / PROCESSOR
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))["feature_extractor"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: holds no settings of a feature extractor ({error})") from error
        check_extractor(settings)
        return dict(settings)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of clips in Hz."""
        return int(self.extractor["sampling_rate"])

    @property
    def max_audio_seconds(self) -> float:
        """Longest clip the model hears whole."""
        return float(self.extractor["n_samples"] / self.sampling_rate)

    def prompt(self, text: str, *, spoken: bool) -> str:
        """One user turn in the chat template, with generation prompt; `spoken` puts a clip before the text."""
        content: Any = ([{"type": "audio", "audio": ""}] if spoken else []) + [{"type": "text", "text": text}]
        content = content if self.hears else text  # templates of text-only models know no parts
        try:
            rendered: str = self._template.render(
                messages=[{"role": "user", "content": content}],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise InputError(f"the chat template cannot be rendered ({error})") from error
        return rendered

    def ids(self, text: str, *, spoken: bool) -> list[int]:
        """The tokens of a user turn. A template that begins with the token of beginning has said it."""
        prompt = self.prompt(text, spoken=spoken)
        first = self._special_tokens.get("bos_token")
        told = bool(first) and prompt.startswith(str(first))
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=not told).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, special ones left out."""
        text: str = self.tokenizer.decode(list(ids))
        return text

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """Special tokens that chat templates name, by their names."""
        path = self.folder / TOKENIZER_CONFIG
        try:
            settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        tokens = {name: settings.get(name) for name in SPECIAL_TOKENS}
        named = {
            name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()
        }
        return {name: token for name, token in named.items() if isinstance(token, str)}

    def features(self, clips: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-mel features (A, M, F) and their attention mask (A, F) of clips at `sampling_rate`.

        As Whisper's: padded with silence to the model's full length, floored 8 decades under the loudest bin.
        """
        samples, hop = int(self.extractor["n_samples"]), int(self.extractor["hop_length"])
        mask_AF = np.zeros((len(clips), samples // hop), dtype=np.int64)
        features = []
        for row, clip in enumerate(clips):
            if clip.size > samples:
                raise InputError(
                    f"the clip has {clip.size} samples; the model hears at most {samples} "
                    f"({self.max_audio_seconds:g} s)"
                )
            mask_AF[row, : -(-clip.size // hop)] = 1
            features.append(self._log_mel(np.pad(clip, (0, samples - clip.size))))
        return np.stack(features).astype(np.float32), mask_AF

    def _log_mel(self, clip: NDArray[np.float32]) -> NDArray[np.float64]:
        from transformers.audio_utils import spectrogram, window_function

        size = int(self.extractor["n_fft"])
        log_mel_MF = spectrogram(
            clip,
            window_function(size, "hann"),
            frame_length=size,
            hop_length=int(self.extractor["hop_length"]),
            power=2.0,
            mel_filters=self._mel_filters,
            log_mel="log10",
        )[:, :-1]
        return np.asarray((np.maximum(log_mel_MF, log_mel_MF.max() - 8.0) + 4.0) / 4.0)

    @cached_property
    def _mel_filters(self) -> NDArray[np.float64]:
        from transformers.audio_utils import mel_filter_bank

        return np.asarray(
            mel_filter_bank(
                num_frequency_bins=1 + int(self.extractor["n_fft"]) // 2,
                num_mel_filters=int(self.extractor["feature_size"]),
                min_frequency=0.0,
                max_frequency=8000.0,
                sampling_rate=self.sampling_rate,
                norm="slaney",
                mel_scale="slaney",
            )
        )

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        source = (self.folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        return environment.from_string(source)


def check_extractor(settings: dict[str, Any]) -> None:
    """Raise `UnsupportedError` when a bundle cannot compute these features without torch."""
    kind = settings.get("feature_extractor_type")
    if kind != SUPPORTED_EXTRACTOR or settings.get("dither", 0.0):
        raise UnsupportedError(
            f"bundles can compute the features of {SUPPORTED_EXTRACTOR} without dither; this model has {kind} "
            f"(dither {settings.get('dither', 0.0)})"
        )


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
