"""The interface of exported graphs: names and dimensions that ONNX stacks agree on.

Exporters name caches by their Python structure and dimensions by solver symbols, numbers included. Here
graph inputs and outputs get the names that ONNX Runtime GenAI, transformers.js and Optimum use, symbols
become `batch`, `sequence`, `past`, `total`, and numbers become numbers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DECODER_DIMS = {
    "inputs_embeds": ("batch", "sequence", None),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
}
CACHE_DIMS = ("batch", None, "past", None)
AUDIO_DIMS = {"input_features": ("clips", None, None), "feature_attention_mask": ("clips", None)}
EMBED_DIMS = {"input_ids": ("batch", "sequence")}


def cache_input_names(num_layers: int) -> list[str]:
    """Names of the cache inputs in graph order: `past_key_values.{i}.key`, `past_key_values.{i}.value`."""
    return [f"past_key_values.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def cache_output_names(num_layers: int) -> list[str]:
    """Names of the cache outputs in graph order: `present.{i}.key`, `present.{i}.value`."""
    return [f"present.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def name_decoder(model: ir.Model, num_layers: int) -> None:
    """Give an exported decoder its contract: names, symbols and numbers."""
    caches = cache_input_names(num_layers)
    dims = {**DECODER_DIMS, **dict.fromkeys(caches, CACHE_DIMS)}
    _rename(model.graph.inputs, [*DECODER_DIMS, *caches])
    _rename(model.graph.outputs, ["logits", *cache_output_names(num_layers)])
    _name_dimensions(model, dims)


def name_audio_encoder(model: ir.Model) -> None:
    """Give an exported audio encoder its contract; frames are fixed by the feature extractor."""
    _rename(model.graph.inputs, list(AUDIO_DIMS))
    _rename(model.graph.outputs, ["audio_features", "audio_feature_lengths"])
    _name_dimensions(model, AUDIO_DIMS)
    features, mask = model.graph.inputs
    assert features.shape is not None  # noqa: S101 - exporters always give graph inputs a shape
    mask.shape = ir.Shape(["clips", features.shape[2]])


def name_embed_tokens(model: ir.Model) -> None:
    """Give an exported token embedding its contract."""
    _rename(model.graph.inputs, list(EMBED_DIMS))
    _rename(model.graph.outputs, ["inputs_embeds"])
    _name_dimensions(model, EMBED_DIMS)


def _rename(values: Iterable[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_dimensions(model: ir.Model, dims: Mapping[str, tuple[str | None, ...]]) -> None:
    """Read what each symbol stands for off the inputs, then rewrite every shape of the graph."""
    meaning: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, role in zip(value.shape or (), dims[str(value.name)], strict=True):
            if role is not None and isinstance(dim, ir.SymbolicDim):
                meaning[str(dim.value)] = role
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_dimension(dim, meaning) for dim in value.shape])


def _dimension(dim: int | ir.SymbolicDim, meaning: Mapping[str, str]) -> int | str | None:
    if not isinstance(dim, ir.SymbolicDim):
        return dim
    if dim.value is None:
        return None
    text = re.sub(r"[A-Za-z_]\w*", lambda match: meaning.get(match.group(), match.group()), str(dim.value))
    if text.isdigit():
        return int(text)
    return "total" if sorted(text.split(" + ")) == ["past", "sequence"] else text
