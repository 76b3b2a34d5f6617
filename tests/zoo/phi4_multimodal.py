"""Phi-4-multimodal: a conformer encoder beside an image encoder inside the decoder's own module, fused projections."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalProcessor,
    Phi4MultimodalVisionConfig,
)

from calibration.processor import LeftOut, audio_only
from tests.zoo.seeing import declare
from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import scatter

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = build_tokenizer(
        "<|user|>", "<|assistant|>", "<|end|>", audio_token="<|audio|>", image_token="<|image|>"
    )
    processor = audio_only(Phi4MultimodalProcessor)(
        LeftOut(), Phi4MultimodalFeatureExtractor(feature_size=32), tokenizer
    )
    tokenizer.chat_template = TEMPLATE  # as in the checkpoint: its processor's class keeps none of its own
    config = Phi4MultimodalConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        audio_config=Phi4MultimodalAudioConfig(
            hidden_size=16,
            intermediate_size=24,
            num_blocks=2,
            num_attention_heads=2,
            ext_pw_out_channel=16,
            depthwise_separable_out_channel=16,
            nemo_conv_channels=16,
            input_size=32,
            bias_max_distance=20,
            audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
        ),
        vision_config=Phi4MultimodalVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            crop_size=28,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        ),
    )
    torch.manual_seed(seed)
    model = scatter(Phi4MultimodalForCausalLM(config), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    declare(folder, image_processor="Phi4MultimodalImageProcessor")
    return folder
