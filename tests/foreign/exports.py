"""Exporters that the project's own environment has, applied to the tiny models: graphs made in a second or two.

Dimensions: B batch, S sequence of this pass, P past, T = P + S.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch import nn
from torch.onnx._internal.torchscript_exporter import utils as torchscript
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from tests.decoders import exporter_warnings
from tests.foreign.checkpoints import build

BATCH, PAST, SEQUENCE = 2, 3, 4


class FlatCausalLM(nn.Module):
    """A causal language model with keys and values as a flat list: key 0, value 0, key 1, …"""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past_key_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Ids (B, S), mask (B, T), positions (B, S), caches (B, H, P, W) -> logits (B, S, V), presents."""
        cache = DynamicCache()
        for layer in range(len(past_key_values) // 2):
            cache.update(past_key_values[2 * layer], past_key_values[2 * layer + 1], layer)
        inputs = {"inputs_embeds" if input_ids.is_floating_point() else "input_ids": input_ids}
        output = self.model(
            **inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        presents = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *presents)


def cache_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Blocks, heads of keys and values, and width of a head."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers), groups, width


def sample(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Arguments of `FlatCausalLM` with every length of its own and one padded position."""
    generator = torch.Generator().manual_seed(0)
    layers, heads, width = cache_shape(model)
    ids_BS = torch.randint(0, int(model.config.vocab_size), (BATCH, SEQUENCE), generator=generator)
    mask_BT = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    mask_BT[0, 0] = 0
    positions_BS = torch.arange(PAST, PAST + SEQUENCE)[None].repeat(BATCH, 1)
    caches = [
        torch.randn(BATCH, heads, PAST, width, generator=generator).to(model.dtype) for _ in range(2 * layers)
    ]
    return ids_BS, mask_BT, positions_BS, *caches


def names(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """The inputs and outputs of the graph of a `FlatCausalLM`, as runtimes expect them."""
    pairs = [f"{layer}.{kind}" for layer in range(cache_shape(model)[0]) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    return inputs, ["logits", *(f"present.{pair}" for pair in pairs)]


def export_torchscript(
    model: PreTrainedModel, path: Path, *, functions: Collection[type[nn.Module]] = (), opset: int = 17
) -> None:
    """By `torch.onnx.export(dynamo=False)`; modules of the classes `functions` become local functions.

    The exporter would note annotated attributes of every module as attributes of its function, and stops at
    those of transformers' classes, which are no values of ONNX: none are noted.
    """
    inputs, outputs = names(model)
    axes = {
        name: {0: "batch", 2: "past"} if name.startswith("past") else {0: "batch", 1: f"{name}_length"}
        for name in inputs
    }
    with exporter_warnings(), mock.patch.object(torchscript, "_get_module_attributes", return_value={}):
        torch.onnx.export(
            FlatCausalLM(copy.deepcopy(model)).eval(),  # the exporter leaves hooks on what it exports
            sample(model),
            path,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            dynamo=False,
            opset_version=opset,
            **({"export_modules_as_functions": set(functions)} if functions else {}),
        )
    if functions:
        _rename_outputs(path, outputs)


def _rename_outputs(path: Path, outputs: list[str]) -> None:
    """Give the outputs of a graph of functions, which the exporter numbers, their names again."""
    model = onnx.load(path)
    new = {value.name: name for value, name in zip(model.graph.output, outputs, strict=True)}
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for value in (*model.graph.output, *model.graph.value_info):
        value.name = new.get(value.name, value.name)
    onnx.save(model, path)


def torchscript_graph(name: str, folder: Path) -> PreTrainedModel:
    """The model `name` by the TorchScript exporter."""
    model = build(name)
    export_torchscript(model, folder / "model.onnx")
    return model


FUNCTIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "blocks": (modeling_llama.LlamaDecoderLayer,),
    "parts": (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP),
    "nested": (
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaMLP,
    ),
    "whole": (modeling_llama.LlamaForCausalLM,),
}
"""What becomes a local function: each block, norms and MLPs in blocks, all of these, or the whole model."""


def functions_graph(level: str, folder: Path) -> PreTrainedModel:
    """The Llama by the TorchScript exporter with modules as local functions."""
    model = build("llama")
    export_torchscript(model, folder / "model.onnx", functions=FUNCTIONS[level])
    return model


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    """A few prefills of random tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(0)
        layers, heads, width = cache_shape(model)
        past = torch.zeros(BATCH, heads, 0, width)
        self.feeds = []
        for _ in range(4):
            ids_BS = torch.randint(0, int(model.config.vocab_size), (BATCH, 8), generator=generator)
            positions_BS = torch.arange(8)[None].repeat(BATCH, 1)
            tensors = (ids_BS, torch.ones_like(ids_BS), positions_BS, *[past] * (2 * layers))
            self.feeds.append(
                {name: tensor.numpy() for name, tensor in zip(names(model)[0], tensors, strict=True)}
            )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.feeds.pop() if self.feeds else None


def qdq_static_graph(folder: Path) -> PreTrainedModel:
    """The Llama with activations and weights of its projections, and its residual adds, between Q and DQ."""
    model = build("llama")
    source = folder / "float.onnx"
    export_torchscript(model, source)
    chosen = [
        node.name
        for node in onnx.load(source).graph.node
        if re.search(r"_proj/MatMul$|lm_head/MatMul$|layers\.\d+/Add(_1)?$", node.name)
    ]
    assert len(chosen) == 22 + 6
    with _quiet():
        quantization.quantize_static(
            source,
            folder / "model.onnx",
            _Calibration(model),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=chosen,
        )
    return model


def dynamic_graph(folder: Path) -> PreTrainedModel:
    """The Llama with `DynamicQuantizeLinear` and `MatMulInteger` for its projections."""
    model = build("llama")
    export_torchscript(model, folder / "float.onnx")
    with _quiet():
        quantization.quantize_dynamic(
            folder / "float.onnx",
            folder / "model.onnx",
            op_types_to_quantize=["MatMul"],
            weight_type=quantization.QuantType.QInt8,
        )
    return model


def qdq_weights_graph(folder: Path) -> PreTrainedModel:
    """The Llama with int4 weights behind `DequantizeLinear`; the model returned has what these compute."""
    model = build("llama")
    export_torchscript(model, folder / "float.onnx", opset=18)  # valid as 21 too, which blocks need
    config = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=True, quant_format=quantization.QuantFormat.QDQ
    )
    with _quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(folder / "float.onnx"), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "model.onnx"))
    return _with_dequantised(model, onnx.load(folder / "model.onnx"))


def _with_dequantised(model: PreTrainedModel, graph: onnx.ModelProto) -> PreTrainedModel:
    """A copy of `model` whose projections hold what the graph's `DequantizeLinear` compute of constants."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    readers = {name: node for node in graph.graph.node for name in node.input}
    state, replaced = copy.deepcopy(model.state_dict()), 0
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            block = next(attribute.i for attribute in node.attribute if attribute.name == "block_size")
            weight, scale = (constants[name].astype(np.float32) for name in node.input[:2])
            zero = (
                constants[node.input[2]].astype(np.float32) if len(node.input) > 2 else np.zeros_like(scale)
            )
            weight_KN = (weight - zero.repeat(block, 0)[: len(weight)]) * scale.repeat(block, 0)[
                : len(weight)
            ]
            scope = readers[node.output[0]].name.removeprefix("/model/").partition("/MatMul")[0]
            key = scope.replace("/", ".") + ".weight"
            assert (state[key] - torch.from_numpy(weight_KN.T)).abs().max() < state[key].abs().max() / 4
            state[key] = torch.from_numpy(np.ascontiguousarray(weight_KN.T))
            replaced += 1
    assert replaced == 22
    dequantised = copy.deepcopy(model)
    dequantised.load_state_dict(state)
    return dequantised


@contextmanager
def _quiet() -> Iterator[None]:
    """What quantizers log of every node they pass, and their advice."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
