"""The processor of a checkpoint: tokenizer, chat template and feature extractor.

Omni models bring processors for images and video too, which need torchvision. Speech needs neither, so they are
left out where they cannot be loaded.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto import processing_auto

if TYPE_CHECKING:
    from pathlib import Path

VISUAL = ("image", "video")
"""What the names of sub-processors for pictures hold."""
NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Where `processor_class` may stand, in the order in which transformers looks for it."""


class LeftOut:
    """Stands where an image or video processor would; nothing asks it for anything while only speech comes in."""

    _auto_class = None


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the processor of a checkpoint, without its image and video parts where torchvision is missing.

    Raises whatever transformers raises for a processor that cannot be loaded.
    """
    auto: Any = transformers.AutoProcessor
    settings = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        return auto.from_pretrained(folder, **settings)
    except Exception:  # torchvision missing, or a folder that this wrote: it holds nothing that sees
        named = _processor_class(folder)
        if named is None or not _visual(named):
            raise
        return audio_only(named).from_pretrained(folder, **settings)


def _processor_class(folder: Path) -> Any:
    for name in NAMED_IN:
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
        except (OSError, ValueError, AttributeError):
            continue
        if named is not None:
            return processing_auto.processor_class_from_name(named)
    return None


def audio_only(processor_class: Any) -> Any:
    """A processor class with `LeftOut` for what sees; an instance saves itself as one of `processor_class`."""
    names = processor_class.get_attributes()
    visual = _visual(processor_class)
    heard = [name for name in names if name not in visual]
    loader = type("Heard", (processor_class,), {"get_attributes": classmethod(lambda _: heard)})

    def load_parts(_cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        parts = iter(loader._get_arguments_from_pretrained(*args, **kwargs))  # type: ignore[attr-defined]
        return [LeftOut() if name in visual else next(parts) for name in names]

    def check_part(self: Any, name: str, part: Any) -> Any:
        return None if name in visual else processor_class.check_argument_for_proper_class(self, name, part)

    def to_dict(self: Any) -> dict[str, Any]:
        saved = processor_class.to_dict(self)
        return {name: value for name, value in saved.items() if name not in visual}

    methods = {
        "_get_arguments_from_pretrained": classmethod(load_parts),
        "check_argument_for_proper_class": check_part,
        "to_dict": to_dict,
        "__doc__": processor_class.__doc__,
    }
    return type(processor_class.__name__, (processor_class,), methods)


def _visual(processor_class: Any) -> list[str]:
    return [name for name in processor_class.get_attributes() if any(kind in name for kind in VISUAL)]
