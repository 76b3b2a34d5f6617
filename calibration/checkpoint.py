"""A checkpoint directory seen from outside: its configuration, identity and size. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from calibration.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_BYTES = 1 << 22
AUDIO_KEYS = ("audio_config", "audio_token_id", "audio_token_index")
"""What the configuration of a model that hears holds: its encoder, or the token that stands for audio."""
PROCESSOR_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint. Raises `InputError` when it is missing or holds no object."""
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such directory; expected a checkpoint saved by save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"model {folder}: config.json cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"model {folder}: config.json is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"model {folder}: config.json holds no object")
    return config


def fingerprint(folder: Path) -> str:
    """Hex sha256 over the configuration and the weight files of a checkpoint, by name and content."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *_weight_files(folder)]:
        with file.open("rb") as opened:
            digest.update(f"{file.name}\0".encode())
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def processor_digest(folder: Path) -> str:
    """Hex sha256 over everything beside the weights: tokenizer, chat template, feature extractor, generation."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in PROCESSOR_SUFFIXES):
        digest.update(f"{file.name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def listening_part(config: dict[str, Any]) -> str | None:
    """The key of the part of a composite configuration that has the audio encoder; None where there is one part.

    A talking model (Qwen-Omni) is a thinker, which hears and writes, and a talker, which speaks what it wrote.
    """
    if any(key in config for key in AUDIO_KEYS):
        return None
    parts = [key for key, value in config.items() if isinstance(value, dict) and "audio_config" in value]
    return parts[0] if len(parts) == 1 else None


def hears_audio(config: dict[str, Any]) -> bool:
    """Whether a configuration names an audio encoder, or at least a token that stands for audio.

    Some families have models without an encoder, whose `audio_config` is null.
    """
    if "audio_config" in config:
        return config["audio_config"] is not None
    return any(key in config for key in AUDIO_KEYS) or listening_part(config) is not None


def check_audio_language_model(folder: Path, config: dict[str, Any]) -> None:
    """Raise `InputError` when a configuration names no audio encoder."""
    if not hears_audio(config):
        raise InputError(
            f"model {folder}: {_architecture_name(config)} has no audio encoder; expected an audio-language model"
        )


def check_language_model(folder: Path, config: dict[str, Any], *, causal: bool) -> None:
    """Raise `InputError` when a configuration is neither of an audio-language model nor of a causal one."""
    if not causal and not hears_audio(config):
        raise InputError(
            f"model {folder}: {_architecture_name(config)} has no audio encoder and is no causal language model; "
            "expected an audio-language model or a text-only one"
        )


def _architecture_name(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"


def parameter_count(folder: Path) -> int:
    """How many parameters the weight files hold, read from their headers."""
    count = 0
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"model {folder}: {file.name} cannot be read ({error})") from error
    return count


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model {folder}: no .safetensors weights in it")
    return files
