"""Decoders as ONNX graphs for tests: the tiny checkpoint's by three exporters, and hand-written variants.

Dimensions: B batch, S sequence of this pass, P past, T = P + S, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from transformers import DynamicCache
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from calibration.decoder_parts import find_decoder
from calibration.lalm import Lalm
from tests import tiny_lalm

BATCH, PAST, SEQUENCE = 2, 3, 4
KV_HEADS, HEAD_WIDTH = 2, 16
EXPORTER_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    ("The feature will be removed. Please remove usage of this function", DeprecationWarning),
    ("Exporting aten::index operator of advanced indexing", UserWarning),
    ("", torch.jit.TracerWarning),
)


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder graph on disk and the PyTorch model it was exported from."""

    path: Path
    model: nn.Module

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)


def session(model: onnx.ModelProto | Path, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on CPU; `folder` holds the external data of a model in memory."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if isinstance(model, Path):
        source: Any = str(model)
    else:
        source = model.SerializeToString()
        if folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_graph(
    runner: onnxruntime.InferenceSession,
    embeds_BSD: torch.Tensor,
    mask_BT: torch.Tensor,
    positions_BS: torch.Tensor,
    past: Sequence[torch.Tensor],
    **steering: np.ndarray,
) -> dict[str, np.ndarray]:
    """All outputs by name. `past` in the order key 0, value 0, key 1, …: the graph's order of inputs."""
    feeds = {
        "inputs_embeds": embeds_BSD.numpy(),
        "attention_mask": mask_BT.numpy(),
        "position_ids": positions_BS.numpy(),
    }
    feeds |= steering
    caches = [value.name for value in runner.get_inputs() if value.name not in feeds]
    assert [name.endswith(("key", "keys")) for name in caches] == [True, False] * (len(caches) // 2)
    feeds |= {name: tensor.numpy() for name, tensor in zip(caches, past, strict=True)}
    names = [value.name for value in runner.get_outputs()]
    return dict(zip(names, runner.run(names, feeds), strict=True))


def run_eager(
    model: nn.Module,
    embeds_BSD: torch.Tensor,
    mask_BT: torch.Tensor,
    positions_BS: torch.Tensor,
    past: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Logits, then keys and values of every layer, of the PyTorch decoder."""
    with torch.inference_mode():
        return list(_FlatDecoder(model)(embeds_BSD, mask_BT, positions_BS, list(past)))


def no_past(batch: int) -> list[torch.Tensor]:
    return [torch.zeros(batch, KV_HEADS, 0, HEAD_WIDTH) for _ in range(2 * tiny_lalm.LAYERS)]


class _FlatDecoder(nn.Module):
    """The language model and head with keys and values as a flat list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        parts = find_decoder(model)
        self.decoder, self.lm_head, self.config = parts.decoder, parts.lm_head, parts.decoder.config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        pairs = zip(past_key_values[::2], past_key_values[1::2], strict=True)
        for layer, (key, value) in enumerate(pairs):
            cache.update(key, value, layer)
        logits, cache = _call(self, inputs_embeds, attention_mask, position_ids, cache)
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class _CacheDecoder(_FlatDecoder):
    """The language model and head with keys and values as a cache object."""

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
    ) -> tuple[torch.Tensor, Any]:
        return _call(self, inputs_embeds, attention_mask, position_ids, past_key_values)


def _call(parts: Any, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
    output = parts.decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return parts.lm_head(output.last_hidden_state), output.past_key_values


def _sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    mask_BT[0, 0] = 0
    positions_BS = torch.arange(PAST, PAST + SEQUENCE)[None].repeat(BATCH, 1)
    past = [
        torch.randn(BATCH, KV_HEADS, PAST, HEAD_WIDTH, generator=generator)
        for _ in range(2 * tiny_lalm.LAYERS)
    ]
    return torch.randn(BATCH, SEQUENCE, tiny_lalm.WIDTH, generator=generator), mask_BT, positions_BS, past


@contextmanager
def exporter_warnings() -> Iterator[None]:
    """Ignore what exporters say of themselves and of the traced library code; all else stays an error."""
    with warnings.catch_warnings():
        for message, category in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


def export_with_transformers(lalm: Lalm, folder: Path, *, ort_fusions: Any = None) -> TinyDecoder:
    embeds, mask, positions, past = _sample()
    cache = DynamicCache()
    for layer in range(tiny_lalm.LAYERS):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    arguments = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
    }
    with exporter_warnings():
        config = OnnxConfig(dynamic=True, ort_fusions=ort_fusions)
        program = OnnxExporter().export(_CacheDecoder(lalm.model).eval(), arguments, config)
        program.save_pretrained(folder)
    return TinyDecoder(folder / "model.onnx", lalm.model)


def _flat_names() -> tuple[list[str], list[str]]:
    pairs = [f"{layer}.{kind}" for layer in range(tiny_lalm.LAYERS) for kind in ("key", "value")]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{x}" for x in pairs)]
    return inputs, ["logits", *(f"present.{x}" for x in pairs)]


def export_with_dynamo(lalm: Lalm, folder: Path) -> TinyDecoder:
    auto = torch.export.Dim.AUTO
    inputs, outputs = _flat_names()
    with exporter_warnings():
        torch.onnx.export(
            _FlatDecoder(lalm.model).eval(),
            _sample(),
            folder / "model.onnx",
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=({0: auto, 1: auto},) * 3 + ([{0: auto, 2: auto}] * (2 * tiny_lalm.LAYERS),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return TinyDecoder(folder / "model.onnx", lalm.model)


def export_with_torchscript(lalm: Lalm, folder: Path) -> TinyDecoder:
    inputs, outputs = _flat_names()
    _torchscript(_FlatDecoder(lalm.model).eval(), _sample(), folder / "model.onnx", inputs, outputs)
    return TinyDecoder(folder / "model.onnx", lalm.model)


def _torchscript(
    module: nn.Module, sample: Any, path: Path, inputs: list[str], outputs: list[str], opset: int = 17
) -> None:
    axes = {
        name: {0: "batch", 2: "past"} if name.startswith("past") else {0: "batch", 1: f"{name}_length"}
        for name in inputs
    }
    with exporter_warnings():
        torch.onnx.export(
            module,
            sample,
            path,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            dynamo=False,
            opset_version=opset,
        )


@dataclass(frozen=True)
class Variant:
    """A way to write a decoder block that real models use."""

    residual: str = "sequential"  # or "parallel", "parallel_sum", "sandwich"
    norm: str = "rms"  # or "rms_gemma", "layer"
    tokens: bool = False  # input_ids and learned positions, as GPT-2, instead of inputs_embeds
    cache: bool = True
    mask: bool = True
    head: str = "all"  # or "last" (of the normed stream), "last_first" (selected before the norm), "capped"
    experts: bool = False
    scaled: bool = False  # a block multiplies its sum by a constant, as Gemma 4
    sharing: int = 0  # how many last blocks attend to keys and values of the one before them
    warm: bool = False  # a residual add without a matrix product before block 0
    dtype: torch.dtype = field(default=torch.float32)


HAND_WIDTH, HAND_LAYERS, HAND_VOCABULARY, HAND_HEADS = 16, 3, 23, 2


class RmsNorm(nn.Module):
    def __init__(self, *, gemma: bool) -> None:
        super().__init__()
        self.weight, self.gemma = nn.Parameter(torch.ones(HAND_WIDTH)), gemma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.gemma:
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


def _norm(kind: str) -> nn.Module:
    return nn.LayerNorm(HAND_WIDTH) if kind == "layer" else RmsNorm(gemma=kind == "rms_gemma")


class HandBlock(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.norms = nn.ModuleList(_norm(variant.norm) for _ in range(4))
        self.qkv = nn.Linear(HAND_WIDTH, 3 * HAND_WIDTH)
        self.out = nn.Linear(HAND_WIDTH, HAND_WIDTH)
        self.up, self.down = nn.Linear(HAND_WIDTH, 24), nn.Linear(24, HAND_WIDTH)
        self.router = nn.Linear(HAND_WIDTH, 2)
        self.register_buffer("scale", torch.tensor([0.7]))

    def attention(
        self, x: torch.Tensor, allowed: torch.Tensor, past: Any, shared: Any
    ) -> tuple[torch.Tensor, Any]:
        batch, sequence, _ = x.shape
        split = (batch, sequence, HAND_HEADS, HAND_WIDTH // HAND_HEADS)
        query, key, value = (part.reshape(split).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if shared is not None:
            key, value = shared
        elif past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.transpose(2, 3) * 0.35
        scores = scores.masked_fill(~allowed[:, None], -1e4).softmax(-1)
        mixed = (scores @ value).transpose(1, 2).reshape(batch, sequence, HAND_WIDTH)
        return self.out(mixed), (key, value)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(nn.functional.silu(self.up(x)))
        return y * self.router(x).softmax(-1)[..., :1] if self.variant.experts else y

    def forward(
        self, x: torch.Tensor, allowed: torch.Tensor, past: Any, shared: Any = None
    ) -> tuple[torch.Tensor, Any]:
        y, present = self.summed(x, allowed, past, shared)
        return (y * self.scale if self.variant.scaled else y), present

    def summed(
        self, x: torch.Tensor, allowed: torch.Tensor, past: Any, shared: Any
    ) -> tuple[torch.Tensor, Any]:
        normed = self.norms[0](x)
        attended, present = self.attention(normed, allowed, past, shared)
        residual = self.variant.residual
        if residual == "parallel":
            return x + attended + self.mlp(self.norms[1](x)), present
        if residual == "parallel_sum":
            return (attended + self.mlp(normed)) + x, present
        if residual == "sandwich":
            x = x + self.norms[2](attended)
            return x + self.norms[3](self.mlp(self.norms[1](x))), present
        x = x + attended
        return x + self.mlp(self.norms[1](x)), present


class HandDecoder(nn.Module):
    """A small decoder with every freedom of `Variant`; random biases, no unit norms."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.tokens = nn.Embedding(HAND_VOCABULARY, HAND_WIDTH)
        self.positions = nn.Embedding(32, HAND_WIDTH)
        self.blocks = nn.ModuleList(HandBlock(variant) for _ in range(HAND_LAYERS))
        self.norm = _norm(variant.norm)
        self.head = nn.Linear(HAND_WIDTH, HAND_VOCABULARY)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.to(variant.dtype).eval()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, *past: torch.Tensor) -> Any:
        """Ids (B, S) or embeddings (B, S, D), mask (B, T) -> logits, and presents where there are pasts."""
        if self.variant.tokens:
            before = past[0].shape[2] if past else 0
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device) + before)
        if self.variant.warm:
            x = x + 0.1 * torch.tanh(x)
        sequence = x.shape[1]
        total = sequence + (past[0].shape[2] if past else 0)
        columns = torch.arange(total, device=x.device)
        allowed = (columns[None] <= columns[total - sequence :, None])[None]
        if mask is not None:
            allowed = allowed & mask[:, None].bool()
        presents: list[torch.Tensor] = []
        owners = HAND_LAYERS - self.variant.sharing
        for layer, block in enumerate(self.blocks):
            if layer >= owners:
                x, _ = block(x, allowed, None, tuple(presents[-2:]))
                continue
            x, present = block(x, allowed, past[2 * layer : 2 * layer + 2] if past else None)
            presents += present
        if self.variant.head == "last_first":
            x = x[:, -1:]
        x = self.norm(x)
        if self.variant.head == "last":
            x = x[:, -1:]
        logits = self.head(x)
        if self.variant.head == "capped":
            logits = torch.tanh(logits / 3) * 3
        return (logits, *presents) if past else logits

    def sample(self, *, batch: int = 2, sequence: int = 4, past: int = 3, seed: int = 0) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        if self.variant.tokens:
            x = torch.randint(0, HAND_VOCABULARY, (batch, sequence), generator=generator)
        else:
            x = torch.randn(batch, sequence, HAND_WIDTH, generator=generator).to(self.variant.dtype)
        shape = (batch, HAND_HEADS, past, HAND_WIDTH // HAND_HEADS)
        owners = HAND_LAYERS - self.variant.sharing
        caches = [torch.randn(shape, generator=generator).to(self.variant.dtype) for _ in range(2 * owners)]
        total = sequence + (past if self.variant.cache else 0)
        mask = torch.ones(batch, total, dtype=torch.long) if self.variant.mask else None
        return (x, mask, *(caches if self.variant.cache else []))


def hand_decoder(variant: Variant, path: Path, *, opset: int = 17) -> tuple[HandDecoder, onnx.ModelProto]:
    """A hand-written decoder and its graph by the TorchScript exporter."""
    model = HandDecoder(variant)
    pairs = [f"{layer}.{kind}" for layer in range(HAND_LAYERS - variant.sharing) for kind in ("key", "value")]
    inputs = ["input_ids" if variant.tokens else "inputs_embeds"]
    inputs += ["attention_mask"] if variant.mask else []
    outputs = ["logits"]
    if variant.cache:
        inputs += [f"past_key_values.{pair}" for pair in pairs]
        outputs += [f"present.{pair}" for pair in pairs]
    _torchscript(model, model.sample(), path, inputs, outputs, opset)
    return model, onnx.load(path)


def hand_feeds(proto: onnx.ModelProto, sample: Sequence[torch.Tensor | None]) -> dict[str, np.ndarray]:
    present = [tensor.numpy() for tensor in sample if tensor is not None]
    return dict(zip((value.name for value in proto.graph.input), present, strict=True))
