"""Kimi-Audio (moonshotai/Kimi-Audio-7B-Instruct) as a model that `sarsteer-export` can drive. See docs/adapters.md.

Its code is not in transformers: it comes with the checkpoint, and its prompts are made by the package `kimia_infer`.
    sarsteer-export calibrate models/Kimi-Audio-7B-Instruct --adapter examples/adapters/kimi_audio.py:KimiAudio \
      --trust-remote-code --harmful ... --benign ... -o plan.safetensors
Dimensions: B requests, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sarsteer_export import ModelAdapter


class KimiAudio(ModelAdapter):
    """Text out, speech in: the blocks that speak are left out, since answers in text do not depend on them."""

    model_types = ("kimi_audio",)

    @classmethod
    def load_model(cls, checkpoint: Any) -> tuple[Any, dict[str, Any]]:
        """By the checkpoint's own code, which `--trust-remote-code` lets run."""
        model, loading = super().load_model(checkpoint)
        model.model.mimo_layers = nn.ModuleList()
        return model, loading

    @classmethod
    def load_processor(cls, checkpoint: Any) -> Any:
        """What makes prompts: text tokenizer, speech tokenizer and Whisper encoder in one."""
        from kimia_infer.api.prompt_manager import KimiAPromptManager

        return KimiAPromptManager(str(checkpoint.folder), checkpoint.config["kimia_token_offset"])

    def check_processor(self, checkpoint: Any) -> None:
        """It is no processor of transformers, and needs no chat template: it makes its prompts itself."""

    hears = True
    sampling_rate = 16_000
    max_audio_seconds = None
    audio_token_id = None  # a clip is many different tokens, of a vocabulary of their own
    audio_token = None
    chat_template = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of text."""
        return self.processor.text_tokenizer

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer in text."""
        return (self.processor.extra_tokens.kimia_text_eos,)

    @property
    def pad_token_id(self) -> int:
        """What lies beside text in the other stream."""
        return self.processor.extra_tokens.kimia_text_blank

    @property
    def embed_tokens(self) -> nn.Module:
        """What the decoder reads of a text token that it wrote: silence lies beside it in the other stream."""
        return TextStream(self.model.get_input_embeddings(), self.processor.extra_tokens.kimia_text_blank)

    def encode(self, texts: Any, audios: Any) -> dict[str, torch.Tensor]:
        """Embeddings, left-padded: the model merges streams and features of one conversation at a time."""
        prompts = [
            self._prompt(text, None if audios is None else audios[number])
            for number, text in enumerate(texts)
        ]
        with torch.no_grad():
            rows = [self._merged(prompt) for prompt in prompts]
        masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
        embeds_BSD, mask_BS = (
            pad_sequence(rows_or_masks, batch_first=True, padding_side="left")
            for rows_or_masks in (rows, masks)
        )
        return {"inputs_embeds": embeds_BSD, "attention_mask": mask_BS, "position_ids": position_ids(mask_BS)}

    def audio_token_count(self, clip: Any) -> int:
        """How many positions hold the clip."""
        return sum(self._prompt("", clip).is_continuous_mask)

    def logits(self, hidden: Any) -> torch.Tensor:
        """Logits (B, S, V) of text. The decoder returns the streams of both heads."""
        logits: torch.Tensor = self.parts.lm_head(hidden[0] if isinstance(hidden, tuple) else hidden)
        return logits

    def generate(
        self, inputs: Any, *, max_new_tokens: int, logits_processor: Any = None, **_: Any
    ) -> torch.Tensor:
        """The most probable text tokens, int64 (B, S), up to the end of the longest answer."""
        (end,) = self.end_token_ids
        step, cache, written = dict(inputs), None, []
        for _number in range(max_new_tokens):
            output = self.parts.decoder(**step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            scores_BV = self.logits(output.last_hidden_state)[:, -1]
            if logits_processor is not None:
                scores_BV = logits_processor(torch.stack(written, 1) if written else None, scores_BV)
            written.append(scores_BV.argmax(dim=-1))
            if all((torch.stack(written, 1) == end).any(dim=1)):
                break
            mask_BT = nn.functional.pad(step["attention_mask"], (0, 1), value=1)
            step = {
                "inputs_embeds": self.embed_tokens(written[-1][:, None]),
                "attention_mask": mask_BT,
                "position_ids": position_ids(mask_BT)[:, -1:],
            }
        return torch.stack(written, dim=1)

    def _prompt(self, text: str, clip: Any) -> Any:
        """One user turn, the text before the clip, as the package makes it of a file."""
        messages = [{"role": "user", "message_type": "text", "content": text}] if text else []
        with tempfile.TemporaryDirectory() as folder:
            if clip is not None:
                path = str(Path(folder) / "clip.wav")
                soundfile.write(path, clip, self.sampling_rate, subtype="FLOAT")
                messages.append({"role": "user", "message_type": "audio", "content": path})
            return self.processor.get_prompt(messages, output_type="text")

    def _merged(self, prompt: Any) -> torch.Tensor:
        """What the first block reads (S, D): both streams of tokens, and the Whisper features of the clip."""
        seen = []

        def stop(_block: nn.Module, args: Any) -> None:
            seen.append(args[0])
            raise _FirstBlockReached

        device, dtype = self.model.device, self.model.dtype
        audio_ids, text_ids, spoken = (tensor.to(device) for tensor in prompt.to_tensor())
        features = [feature.to(device, dtype) for feature in prompt.continuous_feature]
        handle = self.parts.blocks[0].register_forward_pre_hook(stop)
        try:
            self.model(
                input_ids=audio_ids,
                text_input_ids=text_ids,
                whisper_input_feature=features or None,
                is_continuous_mask=spoken,
                use_cache=False,
            )
        except _FirstBlockReached:
            pass
        finally:
            handle.remove()
        return seen[0][0]


def position_ids(mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) counted over attended tokens."""
    return (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)


class TextStream(nn.Module):
    """Text tokens (B, S) -> what the decoder reads of them (B, S, D)."""

    def __init__(self, embedding: nn.Module, blank: int) -> None:
        super().__init__()
        self.embedding, self.blank = embedding, blank

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Text, and silence beside it."""
        return self.embedding(input_ids) + self.embedding(torch.full_like(input_ids, self.blank))


class _FirstBlockReached(Exception):  # noqa: N818 - ends a pass, is no error
    pass
