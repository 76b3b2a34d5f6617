"""Qwen-Omni: thinkers with several axes of positions; whole checkpoints have a talker beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from calibration.processor import LeftOut, audio_only
from tests.zoo.seeing import declare
from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import save

CHUNK_SECONDS = 2
WIDTH = 32
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AUDIO = {
    "num_mel_bins": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "n_window": 50,
    "output_dim": WIDTH,
}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": WIDTH}


def tokenizer_of_omni() -> PreTrainedTokenizerFast:
    return build_tokenizer(
        "<|im_start|>",
        audio_token="<|AUDIO|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
        image_token="<|IMAGE|>",
        video_token="<|VIDEO|>",
        vision_bos_token="<|vision_bos|>",
        vision_eos_token="<|vision_eos|>",
    )


def text_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def save_qwen2_5(folder: Path, *, seed: int = 0) -> Path:
    """The thinker of Qwen2.5-Omni by itself."""
    tokenizer = tokenizer_of_omni()
    save(Qwen2_5OmniThinkerForConditionalGeneration, qwen2_5_thinker(tokenizer), tokenizer, folder, seed=seed)
    _save_processor(folder, Qwen2_5OmniProcessor, tokenizer)
    return folder


def save_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """The thinker of Qwen3-Omni by itself: every block chooses 2 of 4 experts."""
    tokenizer = tokenizer_of_omni()
    save(Qwen3OmniMoeThinkerForConditionalGeneration, qwen3_thinker(tokenizer), tokenizer, folder, seed=seed)
    _save_processor(folder, Qwen3OmniMoeProcessor, tokenizer)
    return folder


def qwen2_5_thinker(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5OmniThinkerConfig(
        audio_config=AUDIO,
        vision_config=VISION | {"fullatt_block_indexes": [0]},
        text_config=text_config(tokenizer),
        audio_token_index=token("<|AUDIO|>"),
        image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        pad_token_id=tokenizer.pad_token_id,
    )


def qwen3_thinker(tokenizer: PreTrainedTokenizerFast) -> Qwen3OmniMoeThinkerConfig:
    token = tokenizer.convert_tokens_to_ids
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3OmniMoeThinkerConfig(
        audio_config=AUDIO | {"downsample_hidden_size": 8, "n_window_infer": 100},
        vision_config=VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        text_config=text_config(tokenizer, **experts),
        audio_token_id=token("<|AUDIO|>"),
        image_token_id=token("<|IMAGE|>"),
        video_token_id=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        pad_token_id=tokenizer.pad_token_id,
    )


def _save_processor(folder: Path, kind: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    extractor = WhisperFeatureExtractor(feature_size=32, chunk_length=CHUNK_SECONDS)
    processor = audio_only(kind)(LeftOut(), LeftOut(), extractor, tokenizer, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    declare(folder, image_processor="Qwen2VLImageProcessor", video_processor="Qwen2VLVideoProcessor")


def save_whole_qwen2_5(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2.5-Omni as it is published: the thinker, and something of a talker beside it."""
    tokenizer = tokenizer_of_omni()
    config = Qwen2_5OmniConfig(thinker_config=qwen2_5_thinker(tokenizer).to_dict(), enable_audio_output=False)
    save(Qwen2_5OmniForConditionalGeneration, config, tokenizer, folder, seed=seed)
    _add_talker(folder)
    _save_processor(folder, Qwen2_5OmniProcessor, tokenizer)
    return folder


def save_whole_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3-Omni as it is published: the thinker, and something of a talker beside it."""
    tokenizer = tokenizer_of_omni()
    config = Qwen3OmniMoeConfig(thinker_config=qwen3_thinker(tokenizer).to_dict(), enable_audio_output=False)
    save(Qwen3OmniMoeForConditionalGeneration, config, tokenizer, folder, seed=seed)
    _add_talker(folder)
    _save_processor(folder, Qwen3OmniMoeProcessor, tokenizer)
    return folder


def _add_talker(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"talker.model.norm.weight": torch.ones(4)}, path, {"format": "pt"})
