"""Tiny decoders of real transformers classes with seeded random weights: the models behind the foreign graphs.

Those whose graphs are committed lie in `checkpoints/`; `python -m tests.foreign.checkpoints` writes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
WIDTH, LAYERS, VOCABULARY, HEADS = 32, 3, 80, 4
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}  # ONNX Runtime's GroupQueryAttention turns heads of 16, 32, … only
GEMMA = WIDE | {"query_pre_attn_scalar": 16, "sliding_window": 48}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "qwen2": transformers.Qwen2Config(**WIDE),
    "llama": transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "gemma2": transformers.Gemma2Config(**GEMMA),
    "phi": transformers.PhiConfig(**WIDE, partial_rotary_factor=1.0),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE, use_parallel_residual=True),
    "gptj": transformers.GPTJConfig(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=48,
        n_positions=64,
        rotary_dim=4,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    ),
}
"""By name. The vocabulary has a size of its own: a builder may know the head by it. Rotary bases are the
defaults, so that older readers of a configuration see the same model."""
COMMITTED = ("qwen2", "llama", "gemma2", "phi")


def build(name: str) -> transformers.PreTrainedModel:
    """The float32 model `name`, ready for inference: no zero biases, no unit norms, which would hide a wrong wire."""
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(sorted(CONFIGS).index(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                embedding = "embed" in parameter_name or "wte" in parameter_name
                parameter.copy_(noise if embedding else noise * parameter.shape[1] ** -0.5)
            else:  # a Gemma norm multiplies by 1 + weight
                unit = parameter_name.endswith("weight") and not name.startswith("gemma")
                parameter.copy_(0.3 * noise + (1.0 if unit else 0.0))
    return model.eval()


def main() -> None:
    """Write the checkpoints of the committed graphs."""
    for name in COMMITTED:
        build(name).save_pretrained(CHECKPOINTS / name)


if __name__ == "__main__":
    main()
