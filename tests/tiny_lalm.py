"""A tiny Qwen2-Audio checkpoint with random weights, made in a second: the real classes, files and loader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
]
SAMPLING_RATE = 16_000
CHUNK_SECONDS = 2
LAYERS = 3
WIDTH = 64
SPLIT = {
    "model.audio_tower": "cpu",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "disk",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}
"""A device map that leaves parts of the model on disk."""


def build_processor() -> Qwen2AudioProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["please respond to the audio. I cannot assist with that."],
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
    )
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=CHUNK_SECONDS)
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=fast)


def build_model(processor: Qwen2AudioProcessor, *, layers: int = LAYERS, seed: int = 0) -> torch.nn.Module:
    tokenizer = processor.tokenizer
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=128,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            d_model=32,
            max_source_positions=50 * CHUNK_SECONDS,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no zero biases, no unit norms: either would hide a wrong wire
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_checkpoint(folder: Path, *, layers: int = LAYERS, seed: int = 0) -> Path:
    processor = build_processor()
    build_model(processor, layers=layers, seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_requests(folder: Path, *, count: int, seed: int) -> Path:
    """`count` clips of distinct length (chirps in noise) and a JSON Lines file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        seconds = random.uniform(0.3, 1.5)
        time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
        chirp = np.sin(2 * math.pi * random.uniform(100, 1000) * time * (1 + time))
        clip = 0.3 * chirp + 0.05 * random.standard_normal(time.size)
        soundfile.write(folder / f"{index}.flac", clip, SAMPLING_RATE)
        lines.append(json.dumps({"audio": f"{index}.flac", "text": "please respond to the audio."}))
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
