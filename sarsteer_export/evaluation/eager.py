"""The eager model as a respondent: Hugging Face's own `generate`, greedy, steered by hooks.

Dimensions: B requests, S prompt and answer, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from calibration.lalm import Lalm, encode_requests
from calibration.plan import check_plan_fits
from calibration.states import heard_clips
from calibration.steered import steered
from sarsteer_export.evaluation.respondent import Reply, log_softmax

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest

EAGER = "eager"
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""The most probable token in every step, told to a model with a `generate` of its own too."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""All that is kept of a checkpoint's generation settings: engines answer by none of the others."""


@dataclass(frozen=True)
class EagerRespondent:
    """A loaded model. `force`: accept plans that were made for another model of the same shape."""

    lalm: Lalm
    force: bool = False
    runtime: str = EAGER

    def serves(self, plan: SteeringPlan | None) -> bool:
        """The eager model takes every plan of its shape. Raises `InputError` for another."""
        if plan is not None:
            parts = self.lalm.parts
            check_plan_fits(
                plan,
                hidden_size=parts.hidden_size,
                num_layers=len(parts.blocks),
                fingerprint=self.lalm.fingerprint,
                force=self.force,
            )
        return True

    @contextmanager
    def speaker(self, plan: SteeringPlan | None) -> Iterator[EagerSpeaker]:
        """The model as the plan steers it; outside of its calls the model is as it was."""
        yield EagerSpeaker(self.lalm, plan)


@dataclass(frozen=True)
class EagerSpeaker:
    """The eager model, steered by `plan` if there is one while it is asked."""

    lalm: Lalm
    plan: SteeringPlan | None

    def replies(self, requests: Sequence[SpokenRequest], *, max_new_tokens: int) -> list[Reply]:
        """Greedy answers to a batch of requests."""
        tokens_BS = self._generate(requests, max_new_tokens=max_new_tokens)
        tokenizer, ends = self.lalm.tokenizer, frozenset(self.lalm.adapter.end_token_ids)
        return [
            Reply(tokenizer.decode(row, skip_special_tokens=True), _to_end(row, ends))
            for row in tokens_BS.tolist()
        ]

    def log_probabilities(
        self, requests: Sequence[SpokenRequest], tokens: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities (B, V) of the next token before each of the given ones, which are forced."""
        forced = _Forced(tokens)
        self._generate(
            requests, max_new_tokens=max(map(len, tokens)), logits_processor=LogitsProcessorList([forced])
        )
        return forced.seen

    def _generate(self, requests: Sequence[SpokenRequest], **settings: Any) -> torch.Tensor:
        """The tokens behind the prompts, int64 (B, S)."""
        clips = heard_clips(self.lalm, requests)
        inputs = encode_requests(self.lalm, [request.text for request in requests], clips)
        steering = nullcontext() if self.plan is None else steered(self.lalm.parts, self.plan)
        with torch.inference_mode(), steering, _unaltered(self.lalm.model):
            return self.lalm.adapter.generate(inputs, **GREEDY, **settings).cpu()


@contextmanager
def _unaltered(model: Any) -> Iterator[None]:
    """The model without what its generation settings do to scores, as they suppress or force tokens.

    Not as an argument of `generate`, which would fill what that leaves open from the model's own settings.
    """
    own = getattr(model, "generation_config", None)
    if own is None:  # a model that drives itself
        yield
        return
    kept = {name: getattr(own, name, None) for name in TOKENS}
    model.generation_config = GenerationConfig(**kept)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


class _Forced(LogitsProcessor):
    """Leaves one token to choose in every step, and keeps the log-probabilities of all."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self.seen: list[NDArray[np.float32]] = []
        self._tokens = tokens

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.seen)
        self.seen.append(log_softmax(scores.float().cpu().numpy()))
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self._tokens):
            forced[row, tokens[min(step, len(tokens) - 1)]] = 0.0
        return forced


def eager_answers(
    lalm: Lalm, requests: Sequence[SpokenRequest], plan: SteeringPlan | None, *, max_new_tokens: int
) -> list[str]:
    """Greedy answers of the eager model to a batch of requests, steered by `plan` if there is one."""
    replies = EagerSpeaker(lalm, plan).replies(requests, max_new_tokens=max_new_tokens)
    return [reply.text for reply in replies]


def _to_end(row: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to and with the first that ends an answer; what follows is padding."""
    length = next((number for number, token in enumerate(row, start=1) if token in ends), len(row))
    return tuple(row[:length])
