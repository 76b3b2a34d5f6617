"""Random weights that hide nothing: no zero biases, no unit norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast


def scatter(model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
    """Add noise to every parameter and floating-point buffer that is saved, and switch to inference."""
    torch.manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
        for buffer in dict.fromkeys(model.buffers()):
            if any(buffer is tensor for tensor in saved.values()) and buffer.is_floating_point():
                buffer.mul_(1 + 0.1 * torch.rand_like(buffer))
    return model.eval()


def save(
    model_class: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int
) -> None:
    """Write a model of that class with random weights, as a checkpoint whose answers end at the end token."""
    torch.manual_seed(seed)
    model = scatter(model_class(config), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
