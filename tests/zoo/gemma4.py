"""Gemma 4: conformer encoder, embeddings per block, sliding and full attention, last blocks share keys and values."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4TextConfig,
)

from calibration.processor import LeftOut, audio_only
from tests.zoo.seeing import declare
from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import scatter

BLOCKS, SHARING, WINDOW = 4, 2, 24
TEMPLATE = (
    "<bos>{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Two blocks with keys and values of their own, then two that share them; a prompt outgrows the window."""
    tokenizer = build_tokenizer(
        "<bos>",
        "<|turn>",
        "<turn|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        video_token="<|video|>",
    )
    processor = audio_only(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(feature_size=32), LeftOut(), tokenizer, LeftOut(), chat_template=TEMPLATE
    )
    token = tokenizer.convert_tokens_to_ids
    config = Gemma4Config(
        audio_config=Gemma4AudioConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            subsampling_conv_channels=[32, 4],
            output_proj_dims=16,
        ),
        text_config=Gemma4TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            global_head_dim=16,
            max_position_embeddings=512,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
            final_logit_softcapping=5.0,
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=SHARING,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=token("<bos>"),
            tie_word_embeddings=True,
        ),
        vision_config=None,
        audio_token_id=token("<|audio|>"),
        boa_token_id=token("<|audio>"),
        eoa_token_index=token("<audio|>"),
        image_token_id=token("<|image|>"),
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        video_token_id=token("<|video|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = scatter(Gemma4ForConditionalGeneration(config), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    declare(folder, image_processor="Gemma4ImageProcessor", video_processor="Gemma4VideoProcessor")
    return folder
