"""A Large Audio-Language Model from a checkpoint directory, and where its decoder's parts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from calibration.checkpoint import check_audio_language_model, fingerprint, read_config
from calibration.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DecoderParts:
    """The language model inside a LALM: L blocks, final norm and head around a stream of width D."""

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    hidden_size: int


@dataclass(frozen=True)
class Lalm:
    """A loaded model with its processor. `fingerprint` is the hex sha256 of the checkpoint's files."""

    model: transformers.PreTrainedModel
    processor: Any
    path: Path
    fingerprint: str

    @property
    def parts(self) -> DecoderParts:
        """The decoder's parts."""
        return find_decoder(self.model)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate in Hz that the audio encoder expects."""
        return int(self.processor.feature_extractor.sampling_rate)

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest clip the model hears whole, or None when it has no limit."""
        extractor = self.processor.feature_extractor
        samples = getattr(extractor, "n_samples", None)
        return None if samples is None else samples / self.sampling_rate


def find_decoder(model: nn.Module) -> DecoderParts:
    """Find the decoder of a Hugging Face model by its own accessors.

    Raises `UnsupportedError` when the model does not say where its blocks, final norm or head are.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers model")
    accessors: Any = model
    decoder, lm_head = accessors.get_decoder(), accessors.get_output_embeddings()
    blocks = getattr(decoder, "layers", None)
    final_norm = getattr(decoder, "norm", None)
    if not isinstance(blocks, torch.nn.ModuleList) or final_norm is None or lm_head is None:
        raise UnsupportedError(
            f"{type(model).__name__}: no decoder found; expected get_decoder() with .layers and .norm, and "
            "get_output_embeddings()"
        )
    return DecoderParts(decoder, tuple(blocks), final_norm, lm_head, int(decoder.config.hidden_size))


def load_lalm(path: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Lalm:
    """Load a checkpoint directory as `from_pretrained` does, ready for inference.

    Raises `InputError` when the directory is missing or damaged, or holds no audio-language model.
    """
    folder = Path(path)
    config = read_config(folder)
    architecture = _architecture(folder, config)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    try:
        auto_processor: Any = transformers.AutoProcessor
        processor = auto_processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loading = architecture.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # a damaged file surfaces as almost any exception of the libraries below
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model {folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
    if not hasattr(processor, "feature_extractor") or getattr(processor, "tokenizer", None) is None:
        raise InputError(f"model {folder}: its processor takes no audio; not an audio-language model")
    if incomplete := sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]):
        raise InputError(f"model {folder}: weights missing or of another shape: {', '.join(incomplete[:3])}")
    model.to(target).eval()
    return Lalm(model, processor, folder, fingerprint(folder))


def encode_requests(
    lalm: Lalm, texts: Sequence[str], audios: Sequence[NDArray[np.float32]] | None
) -> dict[str, torch.Tensor]:
    """Turn B user turns into model inputs, left-padded, with the chat template and generation prompt.

    `audios` holds one clip per text, (samples,) float32 at the model's sampling rate, or is None for text
    alone. Position ids follow the attention mask, so that a row's result does not depend on its batch. Raises
    `InputError` when a text holds the token that stands for audio.
    """
    audio_token = lalm.processor.audio_token
    if any(audio_token in text for text in texts):
        raise InputError(f"a text holds {audio_token}, which stands for a clip; remove it")
    clip = [{"type": "audio", "audio": ""}] if audios is not None else []
    conversations = [[{"role": "user", "content": [*clip, {"type": "text", "text": text}]}] for text in texts]
    prompts = lalm.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    spoken = {"audio": list(audios), "sampling_rate": lalm.sampling_rate} if audios is not None else {}
    batch = lalm.processor(text=prompts, return_tensors="pt", padding=True, padding_side="left", **spoken)
    inputs = {name: tensor.to(lalm.model.device) for name, tensor in batch.items()}
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].to(lalm.model.dtype)
    return inputs | {"position_ids": position_ids(inputs["attention_mask"])}


def audio_token_count(lalm: Lalm, clip: NDArray[np.float32]) -> int:
    """How many audio embeddings the model makes of a clip (samples,), by its processor's own count."""
    ids = encode_requests(lalm, [""], [clip])["input_ids"]
    return int((ids == lalm.processor.audio_token_id).sum())


def position_ids(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) counted over attended tokens only; 0 at padding before the first of them."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def _architecture(folder: Path, config: dict[str, Any]) -> Any:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    architecture = getattr(transformers, name, None) if name else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise InputError(
            f"model {folder}: config.json names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    check_audio_language_model(folder, config)
    return architecture
