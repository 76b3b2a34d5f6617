"""Compare what stands around the decoder with the eager model: what it reads, and what the whole bundle says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.states import load_clips
from engines.parity import Measurement
from sarsteer_export.behaviour import eager_answers
from sarsteer_export.oracle import prompt_embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from engines.limits import Limits
    from sarsteer_export.bundle.bundle import Bundle

FEATURES_LIMIT = 5e-4
"""Largest difference of log-mel features: torch's STFT is float32, the bundle's float64, and the
logarithm magnifies that near its floor (4e-5 measured on the pocket LALM's clips)."""
ROLLOUT_TOKENS = 32
"""Longest greedy answer that is compared word for word."""


@dataclass(frozen=True)
class AroundDecoder:
    """Figures of what comes before the decoder, and notes on whole answers."""

    measurements: tuple[Measurement, ...]
    rollouts: tuple[str, ...]


def compare_rollouts(
    lalm: Lalm, bundle: Bundle, plan: SteeringPlan, requests: Sequence[SpokenRequest]
) -> tuple[str, ...]:
    """Whether bundle and eager model say the same, greedily, each on its own. No gate: near-ties may differ."""
    systems = {"unsteered": None, "steered": plan} if bundle.has_unsteered else {"steered": plan}
    notes = []
    for name, active in systems.items():
        wanted = eager_answers(lalm, requests, active, max_new_tokens=ROLLOUT_TOKENS)
        seen = bundle.generate_batch(
            [request.audio for request in requests],
            [request.text for request in requests],
            max_new_tokens=ROLLOUT_TOKENS,
            steering=active is not None,
        )
        same = sum(ours == theirs for ours, theirs in zip(wanted, seen, strict=True))
        notes.append(f"greedy rollouts, {name}: {same} of {len(requests)} word for word the same")
    return tuple(notes)


def compare_prompts(
    lalm: Lalm, bundle: Bundle, requests: Sequence[SpokenRequest], limits: Limits
) -> tuple[Measurement, ...]:
    """What comes before the decoder: features, and prompt embeddings through encoder, embedding and template."""
    clips = load_clips(lalm, requests)
    wanted = lalm.processor.feature_extractor(
        clips,
        sampling_rate=lalm.sampling_rate,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    features, feature_mask = bundle.frontend.features(clips)
    features_error = float(np.abs(wanted["input_features"] - features).max())
    prompts = bundle.prompts(clips, [request.text for request in requests])
    eager = prompt_embeddings(lalm, requests)
    masks_equal = np.array_equal(eager.mask, prompts.mask) and np.array_equal(
        wanted["attention_mask"], feature_mask
    )
    attended = eager.mask != 0
    embeds_error = np.inf
    if masks_equal:
        difference = np.abs(eager.embeds.astype(np.float64) - prompts.embeds)[attended].max()
        embeds_error = float(difference / np.abs(eager.embeds[attended]).max())
    case = "before the decoder"
    return (
        Measurement(case, "attention masks equal", float(masks_equal), 1.0, at_least=True),
        Measurement(case, "log-mel max abs", features_error, FEATURES_LIMIT, at_least=False),
        Measurement(
            case, "prompt embeddings max abs, relative", embeds_error, limits.max_abs, at_least=False
        ),
    )
