"""A checkpoint in the shape of Kimi-Audio's, with code of its own, and the package that makes its prompts."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from tests.zoo.tokenizer import build_tokenizer
from tests.zoo.weights import scatter

CODE = Path(__file__).parent / "kimi_audio_code"
RAN = "KIMI_AUDIO_CODE_RAN"
"""Environment variable with the file that the checkpoint's code touches when it is run."""
BLANK, EOS = "<|im_kimia_text_blank|>", "<|im_kimia_text_eos|>"
BEGIN, END = "<|im_media_begin|>", "<|im_media_end|>"
USER, ASSISTANT, TEXT_ONLY = (
    "<|im_kimia_user_msg_start|>",
    "<|im_kimia_assistant_msg_start|>",
    "<|im_kimia_speech_ct_id|>",
)
MESSAGE_END = "<|im_msg_end|>"
SPEECH_TOKENS, SAMPLES_PER_TOKEN, WHISPER_WIDTH = 16, 1280, 16


def save_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    package = import_module("tests.zoo.kimi_audio_code.modeling_moonshot_kimia")
    tokenizer = build_tokenizer(BLANK, EOS, BEGIN, END, USER, ASSISTANT, TEXT_ONLY, MESSAGE_END)
    token = tokenizer.convert_tokens_to_ids
    config = package.KimiAudioConfig(
        vocab_size=len(tokenizer) + SPEECH_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        kimia_mimo_layers=1,
        kimia_mimo_transformer_from_layer_index=0,
        kimia_token_offset=len(tokenizer),
        kimia_media_begin=token(BEGIN),
        kimia_media_end=token(END),
        kimia_adaptor_input_dim=WHISPER_WIDTH,
    )
    config.auto_map = {
        "AutoConfig": "configuration_moonshot_kimia.KimiAudioConfig",
        "AutoModelForCausalLM": "modeling_moonshot_kimia.MoonshotKimiaForCausalLM",
    }
    torch.manual_seed(seed)
    scatter(package.MoonshotKimiaForCausalLM(config), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in CODE.glob("*_moonshot_kimia.py"):
        shutil.copy(file, folder)
    return folder


def install_prompt_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `from kimia_infer.api.prompt_manager import KimiAPromptManager` find the stand-in below."""
    for name in ("kimia_infer", "kimia_infer.api", "kimia_infer.api.prompt_manager"):
        module = ModuleType(name)
        module.KimiAPromptManager = KimiAPromptManager
        monkeypatch.setitem(sys.modules, name, module)


@dataclass
class Prompt:
    """Two token streams of one length, which of their positions hold a clip, and the clip's Whisper features."""

    audio_token_ids: list[int] = field(default_factory=list)
    text_token_ids: list[int] = field(default_factory=list)
    is_continuous_mask: list[bool] = field(default_factory=list)
    continuous_feature: list[torch.Tensor] = field(default_factory=list)

    def to_tensor(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.tensor([self.audio_token_ids]),
            torch.tensor([self.text_token_ids]),
            torch.tensor([self.is_continuous_mask]),
        )


class KimiAPromptManager:
    """Makes a prompt of messages, clips from files; its audio tokens and features are made up from the samples."""

    def __init__(self, model_path: str, kimia_token_offset: int) -> None:
        from transformers import AutoTokenizer

        self.text_tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
        self.kimia_token_offset = kimia_token_offset
        token = self.text_tokenizer.convert_tokens_to_ids
        self.extra_tokens = SimpleNamespace(kimia_text_blank=token(BLANK), kimia_text_eos=token(EOS))

    def get_prompt(self, messages: list[dict[str, str]], output_type: str) -> Prompt:
        assert output_type == "text"
        prompt = Prompt()
        self._speak(prompt, USER)
        for message in messages:
            assert message["role"] == "user"
            if message["message_type"] == "text":
                for token in self.text_tokenizer.encode(message["content"]):
                    self._append(prompt, self.extra_tokens.kimia_text_blank, token)
            else:
                self._hear(prompt, message["content"])
        for token in (TEXT_ONLY, MESSAGE_END, ASSISTANT):
            self._speak(prompt, token)
        return prompt

    def _hear(self, prompt: Prompt, path: str) -> None:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == 16_000
        count = -(-samples.size // SAMPLES_PER_TOKEN)
        pieces = np.pad(samples, (0, count * SAMPLES_PER_TOKEN - samples.size)).reshape(count, -1)
        spectrum = np.log1p(np.abs(np.fft.rfft(pieces, axis=1))[:, 1 : 1 + WHISPER_WIDTH])
        self._speak(prompt, BEGIN)
        for loudest in spectrum.argmax(axis=1):
            speech = self.kimia_token_offset + int(loudest)
            self._append(prompt, speech, self.extra_tokens.kimia_text_blank, spoken=True)
        self._speak(prompt, END)
        prompt.continuous_feature.append(torch.from_numpy(spectrum.astype(np.float32))[None])

    def _speak(self, prompt: Prompt, token: str) -> None:
        audio = self.text_tokenizer.convert_tokens_to_ids(token)
        self._append(prompt, audio, self.extra_tokens.kimia_text_blank)

    def _append(self, prompt: Prompt, audio: int, text: int, *, spoken: bool = False) -> None:
        prompt.audio_token_ids.append(audio)
        prompt.text_token_ids.append(text)
        prompt.is_continuous_mask.append(spoken)
