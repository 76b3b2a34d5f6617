"""From conversations to the tensors of a training step.

The text of a row is rendered by the processor's own chat template; only the repetition of the audio token and
the log-mel features, computed once per clip instead of once per step, are a fast path, and `check_fast_path`
holds it against the processor.

Dimension legend: N clips, B rows, S tokens, M mel bins (128), F mel frames (300, 10 ms each).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from architecture import audio_token_count
from speech import SAMPLE_RATE_HZ, as_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from transformers import Qwen2AudioProcessor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Row:
    """One conversation: the user's text, the number of the clip that goes with it if any, and the reply."""

    user: str
    clip: int | None
    reply: str


@dataclass(frozen=True)
class Features:
    """Of every clip: `mel` (N, 128, 300) float32 log-mel features, `frames` (N,) frames of speech."""

    mel: Tensor
    frames: Tensor

    def mask(self, clips: Tensor) -> Tensor:
        """`feature_attention_mask` of the given clips: (B, 300), 1 where there is speech."""
        frame_F = torch.arange(self.mel.shape[-1])
        return (frame_F[None, :] < self.frames[clips][:, None]).long()


@dataclass(frozen=True)
class Batch:
    """A right-padded training batch: three (B, S) tensors, and the clips of its spoken rows in row order."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    clips: Tensor


@dataclass
class RowEncoder:
    """Token ids of rows, remembered per text."""

    processor: Qwen2AudioProcessor
    _ids: dict[str, list[int]] = field(default_factory=dict)

    def prompt_ids(self, row: Row, frames_N: Tensor) -> list[int]:
        """Token ids of everything before the reply, audio tokens repeated as often as the clip needs."""
        ids = self._tokens(prompt_text(self.processor, row.user, spoken=row.clip is not None))
        if row.clip is None:
            return ids
        audio_id = self.processor.audio_token_id
        place = ids.index(audio_id)
        return ids[:place] + [audio_id] * audio_token_count(int(frames_N[row.clip])) + ids[place + 1 :]

    def batch(self, rows: Sequence[Row], frames_N: Tensor) -> Batch:
        """Encode rows, right-padded: only the reply and its end-of-turn token carry labels."""
        tokenizer = self.processor.tokenizer
        prompts = [self.prompt_ids(row, frames_N) for row in rows]
        replies = [self._tokens(row.reply + tokenizer.eos_token) for row in rows]
        length = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED_LABEL)
        for place, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            end = len(prompt) + len(reply)
            input_ids[place, :end] = torch.tensor(prompt + reply)
            attention_mask[place, :end] = 1
            labels[place, len(prompt) : end] = torch.tensor(reply)
        clips = torch.tensor([row.clip for row in rows if row.clip is not None], dtype=torch.long)
        return Batch(input_ids, attention_mask, labels, clips)

    def _tokens(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.processor.tokenizer(text)["input_ids"]
        return self._ids[text]


def prompt_text(processor: Qwen2AudioProcessor, user: str, spoken: bool) -> str:
    """The chat template applied to one user turn, generation prompt included."""
    audio = [{"type": "audio", "audio_url": "clip.flac"}] if spoken else []
    conversation: Any = [{"role": "user", "content": [*audio, {"type": "text", "text": user}]}]
    text: str = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return text


def log_mel(processor: Qwen2AudioProcessor, samples: Sequence[NDArray[np.int16]]) -> Features:
    """Features of many clips, a hundred at a time."""
    mel: list[Tensor] = []
    frames: list[Tensor] = []
    for start in range(0, len(samples), 100):
        extracted = processor.feature_extractor(
            [as_float(clip) for clip in samples[start : start + 100]],
            sampling_rate=SAMPLE_RATE_HZ,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        mel.append(extracted["input_features"])
        frames.append(extracted["attention_mask"].sum(-1))
    return Features(torch.cat(mel), torch.cat(frames))


def check_fast_path(encoder: RowEncoder, features: Features, row: Row, samples: NDArray[np.int16]) -> None:
    """Raise `RuntimeError` unless a spoken row is encoded exactly as the processor encodes it."""
    if row.clip is None:
        raise ValueError("the check needs a row with audio")
    processor = encoder.processor
    slow = processor(
        text=prompt_text(processor, row.user, spoken=True),
        audio=[as_float(samples)],
        sampling_rate=SAMPLE_RATE_HZ,
        return_tensors="pt",
    )
    clip = torch.tensor([row.clip])
    agrees = (
        slow["input_ids"][0].tolist() == encoder.prompt_ids(row, features.frames)
        and torch.equal(
            slow["feature_attention_mask"], features.mask(clip).to(slow["feature_attention_mask"].dtype)
        )
        and torch.allclose(slow["input_features"], features.mel[clip], rtol=0, atol=1e-5)
    )
    if not agrees:
        raise RuntimeError("training rows are not encoded as the saved processor encodes them")
