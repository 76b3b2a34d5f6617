"""Export a model's decoder, audio encoder and token embedding through transformers' own ONNX exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from transformers import DynamicCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from calibration.decoder_parts import find_decoder
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, load_lalm
from graph_passes.plan_names import FINGERPRINT_KEY
from sarsteer_export.bundle.manifest import MANIFEST
from sarsteer_export.exporting.components import AudioEncoderComponent, DecoderComponent, EmbedTokensComponent
from sarsteer_export.exporting.contract import name_audio_encoder, name_decoder, name_embed_tokens
from sarsteer_export.staging import check_output, staged_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from calibration.states import Progress

OPSET = 20
DECODER = "decoder_model_merged"
AUDIO_ENCODER = "audio_encoder"
EMBED_TOKENS = "embed_tokens"
STACK_TRACE_KEY = "pkg.torch.onnx.stack_trace"
"""Node metadata with source paths of the exporting machine: half of a graph's size, of use to nobody."""
SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_SEQUENCE = 2, 3, 4
"""Sizes to trace with: distinct and above 1, so that no dimension is taken for a constant."""


@dataclass(frozen=True)
class ExportedComponents:
    """Paths of the ONNX files of one export; weights lie beside each in `<name>.onnx_data`."""

    decoder: Path
    audio_encoder: Path
    embed_tokens: Path

    @classmethod
    def within(cls, folder: Path) -> ExportedComponents:
        """The components as `export` lays them out in a folder."""
        return cls(*(folder / f"{name}.onnx" for name in (DECODER, AUDIO_ENCODER, EMBED_TOKENS)))


def export(
    model: str | Path | Lalm,
    output: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportedComponents:
    """Export the unsteered model to `output`: one decoder graph for prefill and decode, encoder, embedding.

    The folder `output` appears when everything is exported. Raises `InputError` when it exists (unless
    `overwrite`), `UnsupportedError` for a model whose parts cannot be found or traced.
    """
    target = check_output(output, overwrite=overwrite)
    if (target / MANIFEST).exists():
        raise InputError(f"{target}: is a bundle; an export does not replace one, name another output")
    lalm = model if isinstance(model, Lalm) else load_lalm(model, device=device, dtype=dtype)
    with staged_directory(target, overwrite=overwrite) as folder:
        components = ExportedComponents.within(folder)
        steps: list[Callable[[], None]] = [
            lambda: export_decoder(lalm.model, components.decoder, fingerprint=lalm.fingerprint),
            lambda: _write(_trace_audio_encoder(lalm), components.audio_encoder, lalm.fingerprint),
            lambda: _write(_trace_embed_tokens(lalm), components.embed_tokens, lalm.fingerprint),
        ]
        for number, step in enumerate(steps):
            if progress is not None:
                progress("export", number, len(steps))
            step()
        if progress is not None:
            progress("export", len(steps), len(steps))
    return ExportedComponents.within(target)


def export_decoder(model: PreTrainedModel, path: Path, *, fingerprint: str | None = None) -> None:
    """Export the decoder of any transformers model that has one, causal language models included.

    Writes `path` and its weights beside it. `fingerprint`, when given, ties the graph to a checkpoint.
    """
    parts = find_decoder(model)
    embeds = torch.randn(SAMPLE_BATCH, SAMPLE_SEQUENCE, parts.hidden_size).to(model.device, model.dtype)
    component = DecoderComponent(model)
    total = SAMPLE_PAST + SAMPLE_SEQUENCE
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(SAMPLE_BATCH, total, dtype=torch.long, device=model.device),
        "position_ids": torch.arange(SAMPLE_PAST, total, device=model.device).repeat(SAMPLE_BATCH, 1),
        "past_key_values": _sample_cache(component.config, like=embeds),
    }
    traced = _trace(component, inputs)
    name_decoder(traced, len(parts.blocks))
    _write(traced, path, fingerprint)


def _sample_cache(config: Any, *, like: torch.Tensor) -> DynamicCache:
    """A KV cache of random positions to trace with; keys and values (B, H, P, W)."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (SAMPLE_BATCH, config.num_key_value_heads, SAMPLE_PAST, width)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(like), torch.randn(shape).to(like), layer)
    return cache


def _trace_audio_encoder(lalm: Lalm) -> ir.Model:
    extractor = lalm.processor.feature_extractor
    frames = int(extractor.nb_max_frames)
    features = torch.randn(SAMPLE_BATCH, int(extractor.feature_size), frames)
    mask = torch.ones(SAMPLE_BATCH, frames, dtype=torch.long, device=lalm.model.device)
    mask[1, frames // 2 :] = 0
    inputs = {
        "input_features": features.to(lalm.model.device, lalm.model.dtype),
        "feature_attention_mask": mask,
    }
    traced = _trace(AudioEncoderComponent(lalm.model), inputs)
    name_audio_encoder(traced)
    return traced


def _trace_embed_tokens(lalm: Lalm) -> ir.Model:
    ids = torch.arange(SAMPLE_BATCH * SAMPLE_SEQUENCE, device=lalm.model.device)
    traced = _trace(EmbedTokensComponent(lalm.model), {"input_ids": ids.view(SAMPLE_BATCH, SAMPLE_SEQUENCE)})
    name_embed_tokens(traced)
    return traced


def _trace(component: nn.Module, inputs: dict[str, Any]) -> ir.Model:
    with _quiet(), torch.no_grad():
        try:
            make_exporter: Any = OnnxExporter
            config = OnnxConfig(dynamic=True, opset_version=OPSET)
            exported = make_exporter().export(component.eval(), inputs, config)
        except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedError(
                f"{type(component).__name__}: cannot be exported to ONNX ({reason})"
            ) from error
    program: ir.Model = exported.program
    return program


def _write(model: ir.Model, path: Path, fingerprint: str | None) -> None:
    if fingerprint is not None:
        model.metadata_props[FINGERPRINT_KEY] = fingerprint
    for node in model.graph:
        node.metadata_props.pop(STACK_TRACE_KEY, None)
    data = path.with_name(f"{path.name}_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=1024)
    for file in (path, data):
        if file.exists():
            file.chmod(0o644)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress prints, version notes and deprecation warnings out of our output."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
