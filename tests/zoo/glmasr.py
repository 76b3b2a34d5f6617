"""GLM-ASR: a Whisper-like encoder with rotary positions, four frames to an embedding, a Llama decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GlmAsrConfig,
    GlmAsrEncoderConfig,
    GlmAsrForConditionalGeneration,
    GlmAsrProcessor,
    LlamaConfig,
    WhisperFeatureExtractor,
)

from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import scatter

CHUNK_SECONDS = 2
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|begin_of_audio|><|pad|><|end_of_audio|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = build_tokenizer(
        "<|user|>", "<|assistant|>", "<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>"
    )
    extractor = WhisperFeatureExtractor(feature_size=32, chunk_length=CHUNK_SECONDS)
    processor = GlmAsrProcessor(extractor, tokenizer, chat_template=TEMPLATE)
    config = GlmAsrConfig(
        audio_config=GlmAsrEncoderConfig(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=50 * CHUNK_SECONDS,
            num_mel_bins=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = scatter(GlmAsrForConditionalGeneration(config), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
