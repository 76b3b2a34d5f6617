"""Export a model's decoder, audio encoder and token embedding through transformers' own ONNX exporter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm
from calibration.model_options import ModelOptions
from graph_passes.attention import PER_LAYER_INPUTS
from sarsteer_export.bundle.manifest import MANIFEST
from sarsteer_export.exporting.audio_encoder import (
    AudioEncoderComponent,
    PackedAudioEncoder,
    encoder_sample,
    flat_encoder,
    is_like_qwen2_audio,
)
from sarsteer_export.exporting.components import DecoderComponent, EmbedTokensComponent
from sarsteer_export.exporting.contract import (
    name_audio_encoder,
    name_decoder,
    name_embed_tokens,
    name_flat_audio_encoder,
)
from sarsteer_export.exporting.phi4_encoder import Phi4AudioEncoder
from sarsteer_export.exporting.tracing import trace, write
from sarsteer_export.staging import check_output, staged_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir
    from transformers import PreTrainedModel

    from calibration.model_adapter import ModelAdapter
    from calibration.states import Progress

DECODER = "decoder_model_merged"
AUDIO_ENCODER = "audio_encoder"
EMBED_TOKENS = "embed_tokens"
SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_SEQUENCE = 2, 3, 4
"""Sizes to trace with: distinct and above 1, so that no dimension is taken for a constant."""


@dataclass(frozen=True)
class ExportedComponents:
    """Paths of the ONNX files of one export; weights lie beside each in `<name>.onnx_data`.

    `missing`: components that the model has and that cannot be exported, each with the reason.
    """

    decoder: Path
    audio_encoder: Path
    embed_tokens: Path
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def within(cls, folder: Path, missing: dict[str, str] | None = None) -> ExportedComponents:
        """The components as `export` lays them out in a folder."""
        decoder, encoder, embedding = (
            folder / f"{name}.onnx" for name in (DECODER, AUDIO_ENCODER, EMBED_TOKENS)
        )
        return cls(decoder, encoder, embedding, missing or {})


def export(
    model: str | Path | Lalm,
    output: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    loading: ModelOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportedComponents:
    """Export the unsteered model to `output`: one decoder graph for prefill and decode, encoder, embedding.

    A text-only model has no encoder; that of an audio-language model which cannot be traced is left out, and the
    result says why. The folder `output` appears when everything is exported. Raises `InputError` when it exists
    (unless `overwrite`), `UnsupportedError` for a model whose decoder cannot be found or traced.
    """
    target = check_output(output, overwrite=overwrite)
    if (target / MANIFEST).exists():
        raise InputError(f"{target}: is a bundle; an export does not replace one, name another output")
    lalm = (
        model
        if isinstance(model, Lalm)
        else (loading or ModelOptions()).load(model, device=device, dtype=dtype)
    )
    missing: dict[str, str] = {}
    with staged_directory(target, overwrite=overwrite) as folder:
        components = ExportedComponents.within(folder)

        def encoder() -> None:
            try:
                traced = _trace_audio_encoder(lalm)
            except UnsupportedError as error:
                missing[AUDIO_ENCODER] = str(error)
            else:
                write(traced, components.audio_encoder, lalm.fingerprint)

        steps: list[Callable[[], None]] = [
            lambda: export_decoder(lalm.adapter, components.decoder, fingerprint=lalm.fingerprint),
            *([encoder] if lalm.hears else []),
            lambda: write(_trace_embed_tokens(lalm), components.embed_tokens, lalm.fingerprint),
        ]
        for number, step in enumerate(steps):
            if progress is not None:
                progress("export", number, len(steps))
            step()
        if progress is not None:
            progress("export", len(steps), len(steps))
    return ExportedComponents.within(target, missing)


def export_decoder(
    model: PreTrainedModel | ModelAdapter, path: Path, *, fingerprint: str | None = None
) -> None:
    """Export the decoder of any transformers model that has one, causal language models included.

    Writes `path` and its weights beside it. `fingerprint`, when given, ties the graph to a checkpoint.
    """
    component = DecoderComponent(model).eval()
    inputs = _sample_inputs(component)
    traced = trace(component, inputs)
    name_decoder(traced, len(inputs["past_key_values"].layers), per_layer=PER_LAYER_INPUTS in inputs)
    write(traced, path, fingerprint)


def _sample_inputs(component: DecoderComponent) -> dict[str, Any]:
    """Inputs of a pass to trace with; its cache is what the model itself leaves of a pass of P positions."""
    weight = next(component.parts.decoder.parameters())
    past = _random_inputs(component, SAMPLE_PAST, like=weight)
    cache: Any = DynamicCache()
    with torch.no_grad():
        positions = torch.arange(SAMPLE_PAST, device=weight.device).repeat(SAMPLE_BATCH, 1)
        # Without a mask: of weights on the meta device, which have no values, no model can ask for its own.
        component(**past, attention_mask=None, position_ids=positions, past_key_values=cache)
    total = SAMPLE_PAST + SAMPLE_SEQUENCE
    embeds, *per_layer = _random_inputs(component, SAMPLE_SEQUENCE, like=weight).items()
    return {
        **dict([embeds]),
        "attention_mask": torch.ones(SAMPLE_BATCH, total, dtype=torch.long, device=weight.device),
        "position_ids": torch.arange(SAMPLE_PAST, total, device=weight.device).repeat(SAMPLE_BATCH, 1),
        "past_key_values": cache,
        **dict(per_layer),
    }


def _random_inputs(component: DecoderComponent, sequence: int, *, like: torch.Tensor) -> dict[str, Any]:
    sizes: dict[str, tuple[int, ...]] = {"inputs_embeds": (component.parts.hidden_size,)}
    if component.per_layer_width:
        sizes[PER_LAYER_INPUTS] = (len(component.parts.blocks), component.per_layer_width)
    return {name: torch.randn(SAMPLE_BATCH, sequence, *size).to(like) for name, size in sizes.items()}


def _trace_audio_encoder(lalm: Lalm) -> ir.Model:
    if not is_like_qwen2_audio(lalm.model):
        component = flat_encoder(lalm.model)
        sample = encoder_sample(lalm, component.names)
        told = sample.inputs
        if isinstance(component, PackedAudioEncoder):
            features, mask = (sample.inputs[name] for name in component.names)
            told = {"features": features, "mask": mask}
        if isinstance(component, Phi4AudioEncoder):
            told = {name: component.of_several_windows(told[name]) for name in component.names}
        traced = trace(component, told)
        name_flat_audio_encoder(traced, sample.sizes)
        return traced
    extractor = lalm.processor.feature_extractor
    frames = int(extractor.nb_max_frames)
    features = torch.randn(SAMPLE_BATCH, int(extractor.feature_size), frames)
    mask = torch.ones(SAMPLE_BATCH, frames, dtype=torch.long, device=lalm.model.device)
    mask[1, frames // 2 :] = 0
    traced = trace(
        AudioEncoderComponent(lalm.model),
        {
            "input_features": features.to(lalm.model.device, lalm.model.dtype),
            "feature_attention_mask": mask,
        },
    )
    name_audio_encoder(traced)
    return traced


def _trace_embed_tokens(lalm: Lalm) -> ir.Model:
    ids = torch.arange(SAMPLE_BATCH * SAMPLE_SEQUENCE, device=lalm.model.device)
    traced = trace(EmbedTokensComponent(lalm.adapter), {"input_ids": ids.view(SAMPLE_BATCH, SAMPLE_SEQUENCE)})
    name_embed_tokens(traced)
    return traced
