"""Granite Speech: a conformer encoder, a windowed Q-Former as projector, a Granite decoder with its multipliers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Blip2QFormerConfig,
    GraniteConfig,
    GraniteSpeechConfig,
    GraniteSpeechEncoderConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
)

from tests.zoo import torchaudio_stand_in
from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import scatter

TEMPLATE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    torchaudio_stand_in.install()
    tokenizer = build_tokenizer("<|start_of_role|>", "<|end_of_role|>", audio_token="<|audio|>")
    processor = GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer, chat_template=TEMPLATE)
    config = GraniteSpeechConfig(
        encoder_config=GraniteSpeechEncoderConfig(
            input_dim=160,
            num_layers=2,
            hidden_dim=16,
            feedforward_mult=2,
            num_heads=2,
            output_dim=8,
            context_size=20,
            max_pos_emb=32,
            conv_kernel_size=5,
        ),
        projector_config=Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            encoder_hidden_size=16,
            cross_attention_frequency=1,
            vocab_size=8,
            max_position_embeddings=16,
        ),
        text_config=GraniteConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            attention_multiplier=0.4,
            logits_scaling=2.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        ),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = scatter(GraniteSpeechForConditionalGeneration(config), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
