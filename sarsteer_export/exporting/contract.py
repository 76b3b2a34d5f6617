"""The interface of exported graphs: names and dimensions that ONNX stacks agree on.

Exporters name caches by their Python structure and dimensions by solver symbols, numbers included. Here
graph inputs and outputs get the names that ONNX Runtime GenAI, transformers.js and Optimum use, symbols
become `batch`, `sequence`, `past`, `total`, and numbers become numbers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx_ir as ir

from graph_passes.attention import PER_LAYER_INPUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DECODER_DIMS = {
    "inputs_embeds": ("batch", "sequence", None),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
}
PER_LAYER_DIMS = {PER_LAYER_INPUTS: ("batch", "sequence", None, None)}
CACHE_DIMS = ("batch", None, "past", None)
AUDIO_DIMS = {"input_features": ("clips", None, None), "feature_attention_mask": ("clips", None)}
EMBED_DIMS = {"input_ids": ("batch", "sequence")}
TOKEN_AUDIO_DIMS: dict[str, tuple[str | None, ...]] = {"input_ids": ("batch", "sequence")}
"""Dimensions of inputs of an audio encoder that hold tokens, not frames."""


def cache_input_names(num_layers: int) -> list[str]:
    """Names of the cache inputs in graph order: `past_key_values.{i}.key`, `past_key_values.{i}.value`."""
    return [f"past_key_values.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def cache_output_names(num_layers: int) -> list[str]:
    """Names of the cache outputs in graph order: `present.{i}.key`, `present.{i}.value`."""
    return [f"present.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def name_decoder(model: ir.Model, num_caches: int, *, per_layer: bool = False) -> None:
    """Give an exported decoder its contract: names, symbols and numbers.

    `num_caches`: how many blocks have keys and values of their own. `per_layer`: blocks read `per_layer_inputs`.
    """
    caches = cache_input_names(num_caches)
    dims = {**DECODER_DIMS, **dict.fromkeys(caches, CACHE_DIMS), **(PER_LAYER_DIMS if per_layer else {})}
    _rename(model.graph.inputs, list(dims))
    _rename(model.graph.outputs, ["logits", *cache_output_names(num_caches)])
    _name_dimensions(model, dims)


def name_audio_encoder(model: ir.Model) -> None:
    """Give an exported audio encoder its contract; frames are fixed by the feature extractor."""
    _rename(model.graph.inputs, list(AUDIO_DIMS))
    _rename(model.graph.outputs, ["audio_features", "audio_feature_lengths"])
    _name_dimensions(model, AUDIO_DIMS)
    features, mask = model.graph.inputs
    assert features.shape is not None  # noqa: S101 - exporters always give graph inputs a shape
    mask.shape = ir.Shape(["clips", features.shape[2]])


def name_flat_audio_encoder(model: ir.Model, sizes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Give an audio encoder of any processor's inputs its contract; embeddings of all clips follow one another.

    `sizes`: by input in graph order, the sizes that a processor always yields, None for those that vary.
    """
    _rename(model.graph.inputs, list(sizes))
    dims: dict[str, tuple[str | None, ...]] = {}
    roles: dict[str, str] = {}
    for value, fixed in zip(model.graph.inputs, sizes.values(), strict=True):
        known = TOKEN_AUDIO_DIMS.get(str(value.name), ("clips",))
        named: list[str | None] = []
        for axis, (dim, size) in enumerate(zip(value.shape or (), fixed, strict=True)):
            symbol = str(dim.value) if isinstance(dim, ir.SymbolicDim) else None
            if size is not None:
                role = str(size)
            elif axis < len(known):
                role = str(known[axis])
            else:
                role = "frames" if "frames" not in roles.values() else f"{value.name}_{axis}"
            named.append(None if symbol is None else roles.setdefault(symbol, role))
        dims[str(value.name)] = tuple(named)
    _rename(model.graph.outputs, ["audio_features"])
    _name_dimensions(model, dims)
    (features,) = model.graph.outputs
    if features.shape is not None and isinstance(features.shape[0], ir.SymbolicDim):
        features.shape = ir.Shape(["audio_tokens", *features.shape[1:]])


def name_embed_tokens(model: ir.Model) -> None:
    """Give an exported token embedding its contract."""
    _rename(model.graph.inputs, list(EMBED_DIMS))
    names = ["inputs_embeds", PER_LAYER_INPUTS]
    _rename(model.graph.outputs, names[: len(model.graph.outputs)])
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
