"""Make the graphs of ONNX Runtime GenAI's builder: float32, embeddings in, int4, sandwich norms, LayerNorm.

In an environment of its own, from the repository root:

    pip install torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 \
        safetensors numpy sympy tqdm requests
    pip install --no-deps onnxruntime-genai==0.18.0
    python tests/foreign/make/genai.py

The builder wants a tokenizer, which no graph depends on: a word-level one is put beside each checkpoint's
copy. The int4 checkpoint is that of the float32 one with the weights that the graph holds, dequantised.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

FOREIGN = Path(__file__).resolve().parents[1]
CHECKPOINTS = FOREIGN / "checkpoints"
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "genai_fp32": ("qwen2", "fp32", ()),
    "genai_embeds": ("qwen2", "fp32", ("exclude_embeds=true",)),
    "genai_int4": ("qwen2", "int4", ("block_size=32", "accuracy_level=1")),
    "genai_gemma2": ("gemma2", "fp32", ("windowed_kv_cache=false",)),
    "genai_phi": ("phi", "fp32", ()),
}
"""Kind -> checkpoint, precision, extra options."""


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """A copy of the checkpoint that has a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    words = {f"<{number}>": number for number in range(80)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<2>", pad_token="<0>").save_pretrained(
        copy
    )
    return copy


def build(kind: str) -> None:
    """Run the builder and keep its graph, weights inline."""
    checkpoint, precision, options = KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = with_tokenizer(CHECKPOINTS / checkpoint, folder)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(folder / "out"), "-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
        command += ["--extra_options", *options] if options else []
        subprocess.run(command, check=True)
        for written in sorted((folder / "out").glob("*.onnx*")):
            print(kind, written.name, written.stat().st_size)
        model = onnx.load(folder / "out" / "model.onnx")
    target = FOREIGN / kind
    target.mkdir(exist_ok=True)
    onnx.save(model, target / "model.onnx")
    if precision == "int4":
        dequantise(model, CHECKPOINTS / checkpoint, CHECKPOINTS / f"{checkpoint}_int4")


def dequantise(model: onnx.ModelProto, checkpoint: Path, target: Path) -> None:
    """Write the checkpoint with every weight of a `MatMulNBits` replaced by what the node computes with."""
    tensors = load_file(checkpoint / "model.safetensors")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    replaced = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            weight_NK = _weight(node, constants)
            for key, rows in _keys(node.input[1], weight_NK, tensors):
                assert np.abs(rows - tensors[key]).max() < 0.5 * np.abs(tensors[key]).max(), key
                tensors[key] = np.ascontiguousarray(rows)
                replaced += 1
    print("dequantised", replaced, "weights")
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for extra in ("config.json", "generation_config.json"):
        shutil.copyfile(checkpoint / extra, target / extra)


def _weight(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> np.ndarray:
    """(N, K) float32: (nibble − zero point) · scale, a block of K at a time; the low nibble comes first."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    N, K, block = attributes["N"], attributes["K"], attributes["block_size"]
    packed = constants[node.input[1]].reshape(N, -1, block // 2)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(N, -1, block).astype(np.float32)
    scales = constants[node.input[2]].reshape(N, -1, 1)
    zero_points: np.ndarray | float = 8.0
    if len(node.input) > 3 and node.input[3]:
        raw = constants[node.input[3]].reshape(N, -1)
        zero_points = np.stack([raw & 15, raw >> 4], axis=-1).reshape(N, -1)[:, : scales.shape[1], None]
    return ((nibbles - zero_points) * scales).reshape(N, -1)[:, :K]


def _keys(name: str, weight_NK: np.ndarray, tensors: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The checkpoint's tensors that a weight of the graph holds, with their rows of it."""
    parts = name.split(".")
    if "lm_head" in name:
        return [("lm_head.weight", weight_NK)]
    layer = next(part for part in parts if part.isdigit())
    prefix = f"model.layers.{layer}."
    if "qkv_proj" in name:
        keys = [f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"]
    else:
        short = next(part for part in parts if part.endswith("_proj"))
        keys = [key for key in tensors if key.startswith(prefix) and key.endswith(f".{short}.weight")]
    edges = np.cumsum([len(tensors[key]) for key in keys])
    assert edges[-1] == len(weight_NK), name
    return list(zip(keys, np.split(weight_NK, edges[:-1]), strict=True))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or KINDS:
        build(chosen)
