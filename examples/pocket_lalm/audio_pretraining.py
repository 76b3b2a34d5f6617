"""Teach the audio tower to hear, before there is a language model to distract it.

A linear head on the tower spells the request in characters under the CTC loss; without this the decoder never
learns to listen. The head is not part of the architecture and is dropped at the end of training.

Dimension legend: N clips, B clips of a step, M mel bins, F mel frames, P tower positions (20 ms), T tower
outputs (40 ms), E tower width, C characters and the CTC blank.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from architecture import audio_token_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    from batches import Features

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
_BLANK = 0


@dataclass(frozen=True)
class Recipe:
    """Length and step sizes of one training phase."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine down to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.02 + 0.98 * cosine)


class SpellingHead(nn.Module):
    """Characters from tower outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(_CHARACTERS) + 1)

    def loss(self, tower_BTE: Tensor, frames_B: Tensor, questions: Sequence[str]) -> Tensor:
        """CTC loss, a scalar: `tower_BTE` (B, T, E), `frames_B` (B,) frames of speech, B spoken questions."""
        log_probabilities_BTC = self.linear(tower_BTE).log_softmax(-1)
        spelled = [
            [_CHARACTERS.index(letter) + 1 for letter in question.lower().rstrip("?")]
            for question in questions
        ]
        return functional.ctc_loss(
            log_probabilities_BTC.transpose(0, 1),
            torch.tensor([letter for word in spelled for letter in word]),
            torch.tensor([audio_token_count(int(frames)) for frames in frames_B]),
            torch.tensor([len(word) for word in spelled]),
            blank=_BLANK,
            zero_infinity=True,
        )


def pretrain_audio_tower(
    tower: Qwen2AudioEncoder,
    features: Features,
    questions: Sequence[str],
    recipe: Recipe,
    report: Callable[[str], None],
) -> SpellingHead:
    """Train `tower` in place; clip n of `features` asks `questions[n]`. Return the head for later."""
    choices = random.Random(0)
    head = SpellingHead(tower.config.d_model)
    parameters = [
        parameter for parameter in (*tower.parameters(), *head.parameters()) if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    tower.train()
    for step in range(recipe.steps):
        set_rate(optimizer, recipe.rate(step))
        clips = torch.tensor(choices.choices(range(len(questions)), k=recipe.batch_size))
        frames_B = features.frames[clips]
        mel_BMF = augmented_mel(features.mel[clips], choices, time_frames=12)
        tower_BTE = tower(
            mel_BMF, attention_mask=tower_mask(frames_B, tower.max_source_positions)
        ).last_hidden_state
        loss = head.loss(tower_BTE, frames_B, [questions[clip] for clip in clips.tolist()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            report(f"audio tower, step {step + 1} of {recipe.steps}: CTC loss {loss.item():.3f}")
    return head


def tower_mask(frames_B: Tensor, positions: int) -> Tensor:
    """Which tower positions hold speech, (B, 1, 1, P) boolean, as the full model masks them."""
    positions_B = (frames_B - 1) // 2 + 1
    return (torch.arange(positions)[None, :] < positions_B[:, None])[:, None, None, :]


def augmented_mel(mel_BMF: Tensor, choices: random.Random, time_frames: int) -> Tensor:
    """A copy of (B, M, F) features, each clip at another loudness and with parts of it blanked.

    Up to 24 adjacent mel bins and up to `time_frames` adjacent frames are blanked (SpecAugment, Park et al.,
    2019). Whisper's features are (log10 power + 4) / 4, so that up to 10 dB more or less add up to 0.25.
    """
    mel_BMF = mel_BMF.clone()
    for clip_MF in mel_BMF:
        clip_MF += choices.uniform(-0.25, 0.25)
        band = choices.randint(0, 24)
        low = choices.randint(0, clip_MF.shape[0] - band)
        clip_MF[low : low + band] = 0
        stretch = choices.randint(0, time_frames)
        # Requests last 1.4 s: later stretches would fall into the padding.
        start = choices.randint(0, 140)
        clip_MF[:, start : start + stretch] = 0
    return mel_BMF


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
