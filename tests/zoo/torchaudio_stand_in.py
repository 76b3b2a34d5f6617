"""A mel spectrogram for Granite Speech's feature extractor, which takes torchaudio's; that has no wheel for CPU torch.

Same arithmetic by the same parameters, of which the extractor gives all but the defaults: power 2, HTK mels, no norm.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import torch
from transformers.audio_utils import mel_filter_bank
from transformers.models.granite_speech import feature_extraction_granite_speech as extraction


class MelSpectrogram(torch.nn.Module):
    """(B, samples) -> (B, mels, frames), frames centred and reflected at the ends."""

    def __init__(
        self, *, sample_rate: int, n_fft: int, win_length: int, hop_length: int, n_mels: int
    ) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        filters = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, None, "htk")
        self.register_buffer("window", torch.hann_window(win_length))
        self.register_buffer("filters", torch.from_numpy(filters).float())

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(
            samples, self.n_fft, self.hop_length, self.win_length, self.window, return_complex=True
        )
        return (spectrum.abs().pow(2).transpose(-1, -2) @ self.filters).transpose(-1, -2)


def install() -> None:
    """Give Granite Speech's feature extractor this spectrogram where torchaudio is not installed."""
    if find_spec("torchaudio") is None:
        extraction.torchaudio = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
        extraction.requires_backends = lambda *_: None
