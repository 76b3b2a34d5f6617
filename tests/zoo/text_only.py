"""Qwen2 and Llama: no audio; the tokenizer alone makes the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import save

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen2(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2, head and embedding tied."""
    return _save(folder, Qwen2ForCausalLM, Qwen2Config, bos="", tie=True, seed=seed)


def save_llama(folder: Path, *, seed: int = 0) -> Path:
    """Llama, whose tokenizer and template would both begin a prompt with the same token."""
    return _save(folder, LlamaForCausalLM, LlamaConfig, bos="<|begin_of_text|>", tie=False, seed=seed)


def _save(folder: Path, model: Any, config: Any, *, bos: str, tie: bool, seed: int) -> Path:
    tokenizer = build_tokenizer("<|im_start|>", *([bos] if bos else []))
    if bos:
        tokenizer.bos_token = bos
        begins = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = TEMPLATE
    settings = config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    save(model, settings, tokenizer, folder, seed=seed)
    tokenizer.save_pretrained(folder)
    return folder
