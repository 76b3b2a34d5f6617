"""Make the graphs of the exporter in transformers: pairs for generation, and half precisions.

In the project's own environment (torch 2.13, transformers 5.23, onnx 1.23, onnxscript 0.7), from the
repository root: `PYTHONPATH=. python tests/foreign/make/transformers_exporter.py`

They take half a minute, too long for tests to make them each time. Of the metadata of nodes only the module
scopes are kept: the rest is bulky and holds paths of the machine. All else is as the exporter wrote it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import DynamicCache, Qwen2AudioConfig, Qwen2AudioEncoderConfig
from transformers import Qwen2AudioForConditionalGeneration as Lalm
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from tests.decoders import exporter_warnings
from tests.foreign.checkpoints import build
from tests.foreign.exports import cache_shape, sample

FOREIGN = Path(__file__).resolve().parents[1]
KEPT = "pkg.torch.onnx.name_scopes"
AUDIO_TOKEN = 79


def keep(written: Path, target: Path) -> None:
    """Write a graph with its weights inline and with module scopes as the only metadata of nodes."""
    model = onnx.load(written)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == KEPT]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    target.parent.mkdir(exist_ok=True)
    onnx.save(model, target)
    print(target.relative_to(FOREIGN), target.stat().st_size)


def generation_pair(kind: str, model: Any, inputs: dict[str, Any], components: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder, exporter_warnings():
        exported = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True))
        exported.save_pretrained(folder)
        print(sorted(path.name for path in Path(folder).iterdir()))
        for component in components:
            keep(Path(folder) / f"{component}.onnx", FOREIGN / kind / f"{component}.onnx")


def padded_mask(batch: int, sequence: int) -> torch.Tensor:
    """Not all ones: with such a mask the exporter would leave the input out."""
    mask_BT = torch.ones(batch, sequence, dtype=torch.long)
    mask_BT[0, :2] = 0
    return mask_BT


def text_pair() -> None:
    ids_BS = torch.randint(3, 70, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids_BS, "attention_mask": padded_mask(2, 5)}
    generation_pair("transformers_text", build("qwen2"), inputs, ("prefill", "decode"))


def lalm_pair() -> None:
    """A Qwen2-Audio around the weights of the text model."""
    text = build("qwen2")
    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=128, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=32,
        max_source_positions=100,
    )  # fmt: skip
    torch.manual_seed(0)
    lalm = Lalm(
        Qwen2AudioConfig(audio_config=encoder, text_config=text.config, audio_token_index=AUDIO_TOKEN)
    ).eval()
    lalm.get_decoder().load_state_dict(text.model.state_dict())
    lalm.get_output_embeddings().load_state_dict(text.lm_head.state_dict())
    ids_BS = torch.randint(3, 70, (2, 54), generator=torch.Generator().manual_seed(0))
    ids_BS[:, 2:52] = AUDIO_TOKEN
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": padded_mask(2, 54),
        "input_features": torch.randn(2, 128, 200),
        "feature_attention_mask": torch.ones(2, 200, dtype=torch.long),
    }
    generation_pair("transformers_lalm", lalm, inputs, ("language_model", "lm_head", "decode"))


def half(kind: str, dtype: torch.dtype) -> None:
    """One graph for prefill and decode, of the whole model in a half precision."""
    model = build("llama").to(dtype)
    ids_BS, mask_BT, positions_BS, *caches = sample(model)
    cache = DynamicCache()
    for layer in range(cache_shape(model)[0]):
        cache.update(caches[2 * layer], caches[2 * layer + 1], layer)
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": mask_BT,
        "position_ids": positions_BS,
        "past_key_values": cache,
    }
    with tempfile.TemporaryDirectory() as folder, exporter_warnings():
        OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(folder)
        keep(Path(folder) / "model.onnx", FOREIGN / kind / "model.onnx")


if __name__ == "__main__":
    text_pair()
    half("transformers_fp16", torch.float16)
    half("transformers_bf16", torch.bfloat16)
    lalm_pair()
