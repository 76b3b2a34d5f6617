"""A language model from a checkpoint directory, how it is driven, and requests as its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibration.architecture import Checkpoint
from calibration.checkpoint import fingerprint, read_config
from calibration.errors import InputError, SarsteerError, UnsupportedError
from calibration.families.choice import adapter_for
from calibration.model_adapter import ModelAdapter
from calibration.not_supported import why_not_supported
from calibration.placement import check_device_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import transformers
    from numpy.typing import NDArray

    from calibration.decoder_parts import DecoderParts, PartNames

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Lalm:
    """A loaded model with its processor. `fingerprint` is the hex sha256 of the checkpoint's files.

    `adapter_type` and `part_names` say how the model is driven where its classes do not say it themselves.
    """

    model: transformers.PreTrainedModel
    processor: Any
    path: Path
    fingerprint: str
    adapter_type: type[ModelAdapter] = ModelAdapter
    part_names: PartNames | None = None

    @cached_property
    def adapter(self) -> ModelAdapter:
        """How this model is driven."""
        return self.adapter_type(self.model, self.processor, self.part_names)

    @property
    def parts(self) -> DecoderParts:
        """The decoder's parts."""
        return self.adapter.parts

    @property
    def hears(self) -> bool:
        """Whether the model takes audio; a text-only model does not."""
        return self.adapter.hears

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.adapter.tokenizer

    @property
    def sampling_rate(self) -> int:
        """Sampling rate in Hz that the audio encoder expects. Raises `InputError` for a text-only model."""
        return self.adapter.sampling_rate

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest clip the model hears whole, or None when it has no limit."""
        return self.adapter.max_audio_seconds


def load_lalm(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    adapter: type[ModelAdapter] | None = None,
    parts: PartNames | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> Lalm:
    """Load a checkpoint directory as `from_pretrained` does, ready for inference.

    Of a composite model (Qwen-Omni) the part that listens and writes is loaded. `adapter` drives the model
    instead of the one chosen for its family; `parts` names the decoder's parts. `device_map` lets accelerate spread
    the model over devices, instead of `device`. Raises `InputError` when the directory is missing or damaged, or holds
    no language model, `UnsupportedError` for a family that cannot be driven.
    """
    folder = Path(path)
    config = read_config(folder)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    target = _usable_device(device)
    if device_map is not None:
        check_device_map(device_map)
    checkpoint = Checkpoint(folder, config, DTYPES[dtype], trust_remote_code, device_map)
    if adapter is None:
        if (reason := why_not_supported(checkpoint.model_type)) is not None:
            raise UnsupportedError(f"model {folder}: {reason}")
        adapter = adapter_for(checkpoint)
    try:
        model, loading = adapter.load_model(checkpoint)
        processor = adapter.load_processor(checkpoint)
    except SarsteerError:
        raise
    except Exception as error:  # a damaged file surfaces as almost any exception of the libraries below
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model {folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
    if incomplete := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise InputError(f"model {folder}: weights missing or of another shape: {', '.join(incomplete[:3])}")
    if device_map is None:
        model.to(target)
    model.eval()
    lalm = Lalm(model, processor, folder, fingerprint(folder), adapter, parts)
    lalm.adapter.check_processor(checkpoint)
    return lalm


def encode_requests(
    lalm: Lalm, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
) -> dict[str, torch.Tensor]:
    """Turn B user turns into model inputs, left-padded, with the chat template and generation prompt.

    `audios` holds one clip per text, (samples,) float32 at the model's sampling rate, or is None for text
    alone. Position ids follow the attention mask, so that a row's result does not depend on its batch. Raises
    `InputError` when a text holds the token that stands for audio.
    """
    return lalm.adapter.encode(texts, audios)


def audio_token_count(lalm: Lalm, clip: NDArray[np.float32]) -> int:
    """How many audio embeddings the model makes of a clip (samples,), by its processor's own count."""
    return lalm.adapter.audio_token_count(clip)


def _usable_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return target
