"""Audio Flamingo 3 and Music Flamingo: clips in windows through a Whisper encoder; the music model times them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    MusicFlamingoConfig,
    MusicFlamingoForConditionalGeneration,
    MusicFlamingoProcessor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)

from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import save

WINDOW_SECONDS = 1
MAX_SECONDS = 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<sound>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_audio_flamingo(folder: Path, *, seed: int = 0) -> Path:
    """Windows of one second, so that a clip may have several."""
    tokenizer = _tokenizer()
    config = AudioFlamingo3Config(**_config(tokenizer))
    save(AudioFlamingo3ForConditionalGeneration, config, tokenizer, folder, seed=seed)
    AudioFlamingo3Processor(_extractor(), tokenizer, TEMPLATE, max_audio_len=MAX_SECONDS).save_pretrained(
        folder
    )
    return folder


def save_music_flamingo(folder: Path, *, seed: int = 0) -> Path:
    """As Audio Flamingo 3, with the time of an embedding in its clip turned into it."""
    tokenizer = _tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = MusicFlamingoConfig(
        **_config(tokenizer),
        audio_bos_token_id=token("<|sound_bos|>"),
        audio_eos_token_id=token("<|sound_eos|>"),
    )
    save(MusicFlamingoForConditionalGeneration, config, tokenizer, folder, seed=seed)
    MusicFlamingoProcessor(_extractor(), tokenizer, TEMPLATE, max_audio_len=MAX_SECONDS).save_pretrained(
        folder
    )
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer("<|im_start|>", "<sound>", "<|sound_bos|>", "<|sound_eos|>")


def _extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=32, chunk_length=WINDOW_SECONDS)


def _config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_size": 16,
            "max_source_positions": 50 * WINDOW_SECONDS,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        "audio_token_id": tokenizer.convert_tokens_to_ids("<sound>"),
        "tie_word_embeddings": False,
    }
