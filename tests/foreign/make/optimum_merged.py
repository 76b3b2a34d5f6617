"""Make the merged decoder of optimum: one `If` with a body for prefill and one for cached decode.

In an environment of its own, from the repository root:

    pip install torch==2.13.0 "transformers==4.48.*" "optimum[exporters]==1.24.0" onnx==1.23.2 onnxruntime==1.32.0
    pip uninstall torchvision timm
    python tests/foreign/make/optimum_merged.py

This optimum is older than PyTorch's change of the default exporter, and means the TorchScript one. The
checkpoints are written by transformers 5; what an older reader lacks of their configuration is its default.
Newer releases of optimum merge no decoders of text models; `optimum_plain` is the one graph that they write.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from optimum.exporters.onnx import main_export

FOREIGN = Path(__file__).resolve().parents[1]


def build(kind: str, checkpoint: str, *, merged: bool) -> None:
    """Export a checkpoint and keep the one graph that serves prefill and decode."""
    with tempfile.TemporaryDirectory() as folder:
        main_export(
            str(FOREIGN / "checkpoints" / checkpoint),
            folder,
            task="text-generation-with-past",
            legacy=merged,
        )
        for written in sorted(Path(folder).glob("*.onnx*")):
            print(kind, written.name, written.stat().st_size)
        name = "decoder_model_merged.onnx" if merged else "model.onnx"
        (FOREIGN / kind).mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / name, FOREIGN / kind / name)


if __name__ == "__main__":
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    build("optimum_merged", "llama", merged=True)
    build("optimum_plain", "llama", merged=False)
