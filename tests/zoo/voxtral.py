"""Voxtral: windows of 30 seconds through a Whisper encoder, four positions to an embedding, a Llama decoder."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from transformers import (
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)

from tests.zoo.weights import save

AUDIO_TOKEN_ID = 24
# fmt: off
SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "<SPECIAL_20>", "<SPECIAL_21>",
    "<SPECIAL_22>", "<SPECIAL_23>", "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]",
)
# fmt: on
"""In the order of the checkpoint's, so that `[AUDIO]` has the number that the processor's class wants."""


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A tokenizer file of mistral-common's own format whose vocabulary is the 256 bytes."""
    pytest.importorskip("mistral_common", reason="Voxtral's tokenizer is mistral-common's")
    from transformers import MistralCommonBackend

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken()), encoding="utf-8")
    tokenizer = MistralCommonBackend.from_pretrained(folder)
    config = VoxtralConfig(
        audio_config={
            "num_mel_bins": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "hidden_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(SPECIAL_TOKENS) + 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        audio_token_id=AUDIO_TOKEN_ID,
        tie_word_embeddings=False,
    )
    save(VoxtralForConditionalGeneration, config, tokenizer, folder, seed=seed)
    VoxtralProcessor(WhisperFeatureExtractor(feature_size=32), tokenizer).save_pretrained(folder)
    return folder


def tekken() -> dict[str, object]:
    """The tokenizer file as JSON."""
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": len(SPECIAL_TOKENS) + 256,
            "default_num_special_tokens": len(SPECIAL_TOKENS),
            "version": "v7",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(SPECIAL_TOKENS)
        ],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 32, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
