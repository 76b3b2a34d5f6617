"""The real architecture and file format of Qwen2-Audio at two million parameters, with random weights.

Dimension legend: D residual width of the decoder, E width of the audio tower, P positions of the audio tower.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from topics import REFUSAL, TRAINING_PROMPTS, Topic

if TYPE_CHECKING:
    from collections.abc import Iterable

VOCABULARY_SIZE = 400
CONTEXT_TOKENS = 512
CLIP_SECONDS = 3
"""Longest clip: 3 s are 300 mel frames, which the tower's stride-2 convolution makes 150 positions."""
AUDIO_POSITIONS = 50 * CLIP_SECONDS
MAX_NEW_TOKENS = 32

_PAD = "<|endoftext|>"
_TURN_START = "<|im_start|>"
_TURN_END = "<|im_end|>"
_AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


def build_processor(topics: Iterable[Topic]) -> Qwen2AudioProcessor:
    """Train a byte-level BPE with Qwen2's own pre-tokenizer and pair it with a 3-second Whisper front end."""
    corpus = [text for topic in topics for text in (topic.question, topic.answer)]
    # The fixed sentences occur in every conversation: repeated, they become few and long tokens.
    corpus += [*TRAINING_PROMPTS, REFUSAL, "You are a helpful assistant.", "system\n", "user\nAudio 1: "] * 20
    untrained = Qwen2Tokenizer(
        eos_token=_TURN_END,
        pad_token=_PAD,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",  # as generation needs it
    )
    tokenizer = untrained.train_new_from_iterator(
        corpus, vocab_size=VOCABULARY_SIZE, new_special_tokens=[_TURN_START, *_AUDIO_TOKENS]
    )
    feature_extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=CLIP_SECONDS)
    return Qwen2AudioProcessor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def build_model(processor: Qwen2AudioProcessor) -> Qwen2AudioForConditionalGeneration:
    """A randomly initialised pocket model whose token ids are those of `processor`; float32."""
    tokenizer = processor.tokenizer
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        d_model=128,
        max_source_positions=AUDIO_POSITIONS,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=processor.audio_token_id
    )
    model = Qwen2AudioForConditionalGeneration(config)
    positions = model.model.audio_tower.embed_positions.weight
    with torch.no_grad():
        # Upstream leaves this table frozen at its random values; the 7B's file holds Whisper's sinusoids.
        positions.copy_(_sinusoids(*positions.shape))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def audio_token_count(mel_frames: int) -> int:
    """Decoder positions of a clip of `mel_frames` (10 ms each): one per 40 ms, as the processor counts."""
    return (((mel_frames - 1) // 2 + 1) - 2) // 2 + 1


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed position table, (P, E): sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    step = math.log(10_000) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
