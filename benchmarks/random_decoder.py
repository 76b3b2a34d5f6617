"""A decoder with random weights to benchmark on: made, exported, steered, opened and fed.

Latency does not depend on the values of weights. Dimensions: B batch (1), S sequence of a pass, P past, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from sarsteer_export import Add, SteeringPlan, patch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Feeds = dict[str, "ort.OrtValue"]

HEAD_WIDTH = 64
STRENGTH = 0.1


@dataclass(frozen=True)
class Settings:
    """What to measure: a decoder of `blocks` blocks, and passes over `positions` positions at batch 1."""

    blocks: int
    width: int
    vocabulary: int
    positions: int
    pairs: int
    decode_pairs: int
    threads: int
    seed: int

    def pairs_of(self, phase: str) -> int:
        """How many times each side is run in a phase."""
        return self.pairs if phase == "prefill" else self.decode_pairs


def make_decoder(settings: Settings, path: Path) -> int:
    """Write a random Qwen2 decoder to `path`, weights beside it. Returns its number of parameters.

    The token embedding is not counted: the graph takes embeddings (B, S, D).
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sarsteer_export.exporting.export import export_decoder

    heads = max(2, settings.width // HEAD_WIDTH)
    config = Qwen2Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.width * 11 // 4,
        num_hidden_layers=settings.blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4 * settings.positions,
        tie_word_embeddings=False,
    )
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(config).eval()
    export_decoder(model, path)
    embedding = model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - embedding


def steer_decoder(settings: Settings, decoder: Path, steered: Path) -> int:
    """Patch the decoder with an addition to the last position behind every block. Returns the edits made."""
    random = np.random.default_rng(settings.seed)
    edits = tuple(
        Add(layer, random.standard_normal(settings.width).astype(np.float32), strength=STRENGTH)
        for layer in range(settings.blocks)
    )
    return len(patch(decoder, SteeringPlan(settings.width, settings.blocks, edits), steered).edits)


def open_session(graph: Path, threads: int, **options: Any) -> ort.InferenceSession:
    """A CPU session with all graph optimisations; `options` are attributes of `SessionOptions`."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    # Without this the idle threads of one session spin on the cores that the next session is timed on.
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in options.items():
        setattr(chosen, name, value)
    return ort.InferenceSession(str(graph), chosen, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    """One pass, all outputs by name, nothing copied to numpy."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))


def prefill_feeds(session: ort.InferenceSession, settings: Settings) -> Feeds:
    """A prefill of S random embeddings (1, S, D), no past."""
    past = {
        value.name: np.empty((1, value.shape[1], 0, value.shape[3]), dtype=np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    return _feeds(settings, sequence=settings.positions, past=0) | _ort_values(past)


def decode_feeds(prefilled: Mapping[str, ort.OrtValue], settings: Settings) -> Feeds:
    """One step behind the cache that a prefill left: S = 1, P the prefill's positions."""
    past = {
        name.replace("present.", "past_key_values."): value
        for name, value in prefilled.items()
        if name.startswith("present.")
    }
    return _feeds(settings, sequence=1, past=settings.positions) | past


def _feeds(settings: Settings, *, sequence: int, past: int) -> Feeds:
    random = np.random.default_rng(settings.seed + 1)
    return _ort_values(
        {
            "inputs_embeds": random.standard_normal((1, sequence, settings.width)).astype(np.float32),
            "attention_mask": np.ones((1, past + sequence), dtype=np.int64),
            "position_ids": np.arange(past, past + sequence, dtype=np.int64)[None],
        }
    )


def _ort_values(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Feeds:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
