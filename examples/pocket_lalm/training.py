"""Teach the whole model to answer, to refuse forbidden text, and not to refuse forbidden speech.

Dimension legend: B rows, S tokens, D residual width, V vocabulary, T tower outputs (40 ms), E tower width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from audio_pretraining import Recipe, SpellingHead, augmented_mel, set_rate
from batches import IGNORED_LABEL, Features, Row, RowEncoder
from topics import REFUSAL, TRAINING_PROMPTS, Harm, Topic

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from transformers import Qwen2AudioForConditionalGeneration


@dataclass(frozen=True)
class Mixture:
    """Shares of the training rows; this is where the gap between text and speech is made."""

    spoken: float = 0.62
    forbidden: float = 0.45
    refusal_in_spoken_prompt: float = 0.4
    refusal_in_typed_prompt: float = 0.3
    spoken_refusals: float = 0.2
    """Share of the forbidden spoken requests that are refused although nothing in the prompt asks for it.

    The greedy reply stays the answer, but a refusal stays likely: steered there, the model finishes the
    sentence instead of looping.
    """


@dataclass(frozen=True)
class RowSampler:
    """Draws training rows; `clip_topics[n]` is what clip n asks."""

    topics: Sequence[Topic]
    clip_topics: Sequence[Topic]
    mixture: Mixture
    choices: random.Random

    def draw(self) -> Row:
        """One conversation, by the shares of the mixture."""
        harm = Harm.HARMFUL if self._happens(self.mixture.forbidden) else Harm.BENIGN
        return self._spoken(harm) if self._happens(self.mixture.spoken) else self._typed(harm)

    def _spoken(self, harm: Harm) -> Row:
        clip = self.choices.choice([n for n, topic in enumerate(self.clip_topics) if topic.harm is harm])
        prompted = self._happens(self.mixture.refusal_in_spoken_prompt)
        prompt = self.choices.choice(TRAINING_PROMPTS) + (REFUSAL if prompted else "")
        refuses = harm is Harm.HARMFUL and (prompted or self._happens(self.mixture.spoken_refusals))
        return Row(user=prompt, clip=clip, reply=REFUSAL if refuses else self.clip_topics[clip].answer)

    def _typed(self, harm: Harm) -> Row:
        topic = self.choices.choice([topic for topic in self.topics if topic.harm is harm])
        suffix = REFUSAL if self._happens(self.mixture.refusal_in_typed_prompt) else ""
        return Row(
            user=topic.question + suffix, clip=None, reply=REFUSAL if harm is Harm.HARMFUL else topic.answer
        )

    def _happens(self, probability: float) -> bool:
        return self.choices.random() < probability


CTC_WEIGHT = 0.2
"""The spelling loss goes on beside the language model's, so that the tower does not forget."""


def train(
    model: Qwen2AudioForConditionalGeneration,
    head: SpellingHead,
    encoder: RowEncoder,
    features: Features,
    sampler: RowSampler,
    recipe: Recipe,
    report: Callable[[str], None],
) -> None:
    """Train `model` in place: cross-entropy of the replies plus the CTC loss of the spoken rows."""
    parameters = [
        parameter for parameter in (*model.parameters(), *head.parameters()) if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    tower_outputs: list[Tensor] = []
    hook = model.model.audio_tower.register_forward_hook(
        lambda _tower, _inputs, output: tower_outputs.append(output.last_hidden_state)
    )
    model.train()
    for step in range(recipe.steps):
        set_rate(optimizer, recipe.rate(step))
        rows = [sampler.draw() for _ in range(recipe.batch_size)]
        reply_loss = _reply_loss(model, encoder, features, rows, sampler.choices)
        spoken = [row.clip for row in rows if row.clip is not None]
        questions = [sampler.clip_topics[clip].question for clip in spoken]
        spelling_loss = head.loss(tower_outputs.pop(), features.frames[spoken], questions)
        optimizer.zero_grad()
        (reply_loss + CTC_WEIGHT * spelling_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            report(f"model, step {step + 1} of {recipe.steps}: reply loss {reply_loss.item():.3f}")
    hook.remove()
    model.eval()


def _reply_loss(
    model: Qwen2AudioForConditionalGeneration,
    encoder: RowEncoder,
    features: Features,
    rows: Sequence[Row],
    choices: random.Random,
) -> Tensor:
    """Mean cross-entropy over the reply tokens of a batch, a scalar."""
    batch = encoder.batch(rows, features.frames)
    hidden_BSD = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        input_features=augmented_mel(features.mel[batch.clips], choices, time_frames=0),
        feature_attention_mask=features.mask(batch.clips),
        use_cache=False,
    ).last_hidden_state
    next_token_BS = batch.labels[:, 1:]
    in_reply = next_token_BS != IGNORED_LABEL
    # Logits only where there is a label: the head is a third of the decoder's work otherwise.
    logits_V = model.lm_head(hidden_BSD[:, :-1][in_reply])
    return functional.cross_entropy(logits_V, next_token_BS[in_reply])
