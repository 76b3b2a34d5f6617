"""Which frontend a bundle of a model has, and its files."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from calibration.errors import UnsupportedError
from sarsteer_export.bundle.frontend import check_extractor
from sarsteer_export.bundle.manifest import BY_PROCESSOR, MANIFEST, TORCH_FREE
from sarsteer_export.bundle.processor_frontend import adapter_named
from sarsteer_export.exporting.audio_encoder import is_like_qwen2_audio

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.lalm import Lalm

PROCESSOR_SUFFIXES = frozenset({".jinja", ".json", ".model", ".tiktoken", ".txt"})
"""Files of a checkpoint that hold its tokenizer, processor, chat template and configuration."""
WEIGHTS_INDEX = ".index.json"
NO_FRONTEND = "frontend"
"""What is missing of a bundle whose inputs nothing in it can make."""


def frontend_of(lalm: Lalm) -> str:
    """Who makes the inputs in a bundle of this model: this package, or the model's own processor."""
    return BY_PROCESSOR if lalm.hears and not is_like_qwen2_audio(lalm.model) else TORCH_FREE


def missing_frontend(lalm: Lalm) -> dict[str, str]:
    """Why a bundle of this model cannot make its inputs, by `NO_FRONTEND`; nothing where it can."""
    if frontend_of(lalm) == TORCH_FREE or adapter_named(lalm.adapter_type.__name__) is lalm.adapter_type:
        return {}
    return {
        NO_FRONTEND: f"its processor is driven by the adapter {lalm.adapter_type.__name__}, which is no part of "
        "this package"
    }


def write_frontend(lalm: Lalm, folder: Path) -> None:
    """Write what a bundle's frontend reads into its folder.

    Raises `UnsupportedError` for a model like Qwen2-Audio whose features this package cannot compute, and for one
    whose files cannot stand beside a bundle's.
    """
    if not lalm.hears:
        lalm.tokenizer.save_pretrained(folder)
        return
    if frontend_of(lalm) == TORCH_FREE:
        extractor: Any = lalm.processor.feature_extractor
        check_extractor(extractor.to_dict())
        lalm.processor.save_pretrained(folder)
        return
    for file in sorted(lalm.path.iterdir()):
        if file.suffix not in PROCESSOR_SUFFIXES or file.name.endswith(WEIGHTS_INDEX) or not file.is_file():
            continue
        if file.name == MANIFEST:
            raise UnsupportedError(f"{file}: a bundle has a file of this name; rename or remove it")
        shutil.copyfile(file, folder / file.name)
