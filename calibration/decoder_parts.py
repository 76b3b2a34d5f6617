"""Where the decoder of a language model is, found by the model's own accessors and structure, or by names.

Dimensions: L decoder blocks, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from calibration.errors import InputError, UnsupportedError
from calibration.not_supported import why_not_supported

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAREST = 4
"""How many names an error offers for one that is not there."""


@dataclass(frozen=True)
class DecoderParts:
    """The language model inside a LALM: L blocks, final norm and head around a stream of width D.

    `decoder`: the module that runs the blocks and the final norm. `position_axes`: how many coordinates a
    position has (rotary sections of time, height and width make 3); those of text and audio are all equal.
    """

    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    hidden_size: int
    position_axes: int = 1


@dataclass(frozen=True)
class PartNames:
    """Dotted names of a decoder's parts inside a model, such as `model.layers`; None where accessors find it.

    `decoder` names the list of blocks; the module around that list is the one that runs them. `embed_tokens`,
    `audio_encoder` and `projector` are in front of the decoder.
    """

    decoder: str | None = None
    final_norm: str | None = None
    lm_head: str | None = None
    embed_tokens: str | None = None
    audio_encoder: str | None = None
    projector: str | None = None


def find_decoder(model: nn.Module, names: PartNames | None = None) -> DecoderParts:
    """Find the decoder of a model: by `names` where they are given, else by transformers' own accessors.

    Raises `UnsupportedError` when blocks, final norm or head are not where accessors and structure say, and
    `InputError` when a name given is not in the model.
    """
    names = names or PartNames()
    blocks: nn.ModuleList | None
    if names.decoder is not None:
        decoder, blocks = _named_blocks(model, names.decoder)
    else:
        decoder = _decoder_of(model)
        blocks = _blocks_of(decoder)
    final_norm = (
        named_module(model, names.final_norm) if names.final_norm else _final_norm_of(decoder, blocks)
    )
    lm_head = named_module(model, names.lm_head) if names.lm_head else _lm_head_of(model)
    if blocks is None or final_norm is None or lm_head is None:
        missing = {"decoder blocks": blocks, "final norm": final_norm, "lm_head": lm_head}
        raise UnsupportedError(
            f"{type(model).__name__}: no decoder found; without {_listed(missing)}; expected get_decoder() with "
            "its blocks in .layers and a .norm, and get_output_embeddings(); or name the parts"
        )
    width = _width(decoder, lm_head)
    return DecoderParts(decoder, tuple(blocks), final_norm, lm_head, width, _position_axes(decoder))


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of a dotted name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _decoder_of(model: nn.Module) -> nn.Module:
    if not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model; name its decoder's parts"
        )
    if (reason := why_not_supported(getattr(model.config, "model_type", None))) is not None:
        raise UnsupportedError(f"{type(model).__name__}: {reason}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__}: no decoder found; its decoder attends to an encoder's states, expected "
            "one residual stream for audio and text"
        )
    decoder: Any = model
    while (inner := decoder.get_decoder()) is not decoder:  # composite models wrap the language model twice
        decoder = inner
        if not isinstance(decoder, transformers.PreTrainedModel):
            break
    found: nn.Module = decoder
    return found


def _blocks_of(decoder: nn.Module) -> nn.ModuleList | None:
    """The list of blocks: `.layers`, or the only list of as many modules of one kind as there are blocks."""
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) > 0:
        return layers
    config = getattr(decoder, "config", None)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    lists = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList)
        and len(child) == depth
        and len({type(block) for block in child}) == 1
    ]
    return lists[0] if len(lists) == 1 else None


def _final_norm_of(decoder: nn.Module, blocks: nn.ModuleList | None) -> nn.Module | None:
    """`.norm`, or the only norm that is a direct child of the decoder and comes after its blocks."""
    norm = getattr(decoder, "norm", None)
    if isinstance(norm, nn.Module):
        return norm
    children = list(decoder.children())
    after = children[children.index(blocks) + 1 :] if blocks is not None and blocks in children else []
    norms = [child for child in after if "norm" in type(child).__name__.lower()]
    return norms[0] if len(norms) == 1 else None


def _lm_head_of(model: nn.Module) -> nn.Module | None:
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if accessor is not None else None
    return head if isinstance(head, nn.Module) else None


def named_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of a dotted name. Raises `InputError`, with the names most like it, when there is none."""
    module = submodule(model, name) if name else None
    if module is None:
        near = _nearest(name, [path for path, _ in _outside_blocks(model)])
        raise InputError(f"{type(model).__name__} has no part {name!r}; nearest are {near}")
    return module


def _named_blocks(model: nn.Module, name: str) -> tuple[nn.Module, nn.ModuleList]:
    blocks = submodule(model, name) if name else None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        lists = [path for path, module in _outside_blocks(model) if isinstance(module, nn.ModuleList)]
        found = "is not in it" if blocks is None else f"is a {type(blocks).__name__}"
        raise InputError(
            f"decoder {name!r} {found}; expected the list of decoder blocks; {type(model).__name__} has the lists "
            f"{_nearest(name, lists)}"
        )
    owner, _, _ = name.rpartition(".")
    return model.get_submodule(owner), blocks


def _outside_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its dotted name, but for those inside of lists."""
    for name, child in model.named_children():
        yield prefix + name, child
        if not isinstance(child, nn.ModuleList):
            yield from _outside_blocks(child, f"{prefix}{name}.")


def _nearest(name: str, paths: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, paths, n=NEAREST, cutoff=0.0)) or "none"


def _width(decoder: nn.Module, lm_head: nn.Module) -> int:
    width = getattr(getattr(decoder, "config", None), "hidden_size", None)
    if width is None:
        weight = lm_head.weight  # (V, D)
        assert isinstance(weight, torch.Tensor)  # noqa: S101 - a head without weights is no head
        width = weight.shape[1]
    return int(width)


def _position_axes(decoder: nn.Module) -> int:
    rope: Any = getattr(getattr(decoder, "config", None), "rope_parameters", None) or {}
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    return len(sections) if sections else 1


def _listed(missing: dict[str, Any]) -> str:
    return ", ".join(name for name, part in missing.items() if part is None)
