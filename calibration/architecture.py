"""Which class of transformers a checkpoint directory is loaded with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto import modeling_auto

from calibration.checkpoint import check_language_model, hears_audio, listening_part
from calibration.errors import InputError
from calibration.remote_code import check_trusted, own_code, remote_class

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory about to be loaded: its `config.json` as JSON, and how to load it.

    `device_map`: as `from_pretrained` takes it; None loads onto the CPU.
    """

    folder: Path
    config: dict[str, Any]
    dtype: torch.dtype
    trust_remote_code: bool = False
    device_map: str | dict[str, Any] | None = None

    @property
    def hears(self) -> bool:
        """Whether the configuration names an audio encoder."""
        return hears_audio(self.config)

    @property
    def runs_own_code(self) -> bool:
        """Whether the model's class is in the checkpoint's own files, which may be run.

        Raises `InputError` when it is there and may not be run.
        """
        if not own_code(self.config) or (
            not self.trust_remote_code and _known_class(self.config) is not None
        ):
            return False
        check_trusted(self.folder, self.config, trust_remote_code=self.trust_remote_code)
        return True

    @property
    def model_type(self) -> str | None:
        """`model_type` of the configuration."""
        return self.config.get("model_type")

    @cached_property
    def listening_config(self) -> Any | None:
        """The configuration of the model that listens and writes, where it is a part of a larger one."""
        part = listening_part(self.config)
        if part is None:
            return None
        whole = transformers.AutoConfig.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=self.trust_remote_code
        )
        return getattr(whole, part)


def model_class(checkpoint: Checkpoint) -> Any:
    """The class to load a checkpoint with: the one it names, or that of its listening part.

    Raises `InputError` when transformers has no such class, or it is no language model.
    """
    if checkpoint.runs_own_code:
        return remote_class(checkpoint.folder, checkpoint.config)
    if checkpoint.listening_config is not None:
        return _class_of_part(checkpoint)
    architecture = _known_class(checkpoint.config)
    if architecture is None:
        raise InputError(
            f"model {checkpoint.folder}: config.json names the architecture {_named_class(checkpoint.config)!r}, which "
            f"transformers {transformers.__version__} does not have"
        )
    causal = architecture.__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    check_language_model(checkpoint.folder, checkpoint.config, causal=causal)
    return architecture


def _known_class(config: dict[str, Any]) -> Any | None:
    name = _named_class(config)
    architecture = getattr(transformers, name, None) if name else None
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    return architecture if known else None


def _named_class(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _class_of_part(checkpoint: Checkpoint) -> Any:
    kind: Any = type(checkpoint.listening_config)
    try:
        return modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING[kind]
    except KeyError:
        raise InputError(
            f"model {checkpoint.folder}: transformers {transformers.__version__} has no model that listens and "
            f"writes for its {kind.__name__}"
        ) from None
