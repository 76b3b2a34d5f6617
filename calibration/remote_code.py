"""Code that a checkpoint brings along: run only when the user says so, and then part of what a plan is from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import transformers

from calibration.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)
"""Keys of `auto_map` that name a model, best first: one with a head before one without."""


def own_code(config: dict[str, Any]) -> dict[str, str]:
    """The classes that a configuration finds in the checkpoint's own files, by Auto class."""
    entries = config.get("auto_map")
    return dict(entries) if isinstance(entries, dict) else {}


def check_trusted(folder: Path, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Raise `InputError` when a checkpoint needs code of its own and may not run it. Runs none of it."""
    if own_code(config) and not trust_remote_code:
        modules = sorted({f"{reference.split('.')[0]}.py" for reference in own_code(config).values()})
        raise InputError(
            f"model {folder}: needs code of its own ({', '.join(modules)}), which was not run; read it, then "
            "give --trust-remote-code (trust_remote_code=True) to run it"
        )


def remote_class(folder: Path, config: dict[str, Any]) -> Any:
    """The Auto class that loads a checkpoint's own model. Raises `InputError` when it names none."""
    named = [name for name in AUTO_CLASSES if name in own_code(config)]
    if not named:
        raise InputError(
            f"model {folder}: auto_map in config.json names {', '.join(own_code(config))}; expected one of "
            f"{', '.join(AUTO_CLASSES)}"
        )
    return getattr(transformers, named[0])


def code_digest(folder: Path) -> str:
    """Hex sha256 over the Python files of a checkpoint, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(f"{file.name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
