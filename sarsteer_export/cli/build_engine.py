"""`sarsteer-export build-engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sarsteer_export.cli.command import Command, Progress, emit
from sarsteer_export.cli.options import FILE, FOLDER, engine_options, engine_settings, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("build-engine", cls=Command)
@click.argument("decoder", type=FILE)
@click.option(
    "--output", "-o", type=FOLDER, required=True, help="Folder that the engines' folders appear in."
)
@engine_options
@overwrite_option
def command(decoder: Path, output: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Build TensorRT engines of the ONNX file DECODER; no model is needed.

    Each engine lies in a folder of its own, named by backend, version, target and precision, beside a sidecar
    (JSON) that says what it is. The graph's types are kept: a float16 graph becomes a float16 engine. Every
    steering constant of the graph must reach TensorRT's network, or nothing is built.

    \b
    Examples:
      sarsteer-export build-engine onnx/steered.onnx --engine tensorrt-rtx -o build/engines
      sarsteer-export build-engine onnx/steered.onnx --engine tensorrt-rtx -o build/engines \\
        --profile prefill --min-shapes inputs_embeds:1x1x4096 --opt-shapes inputs_embeds:1x256x4096 \\
        --max-shapes inputs_embeds:4x1024x4096
    """
    from sarsteer_export.engine_build import build_engines

    settings = engine_settings(given)
    built = build_engines(decoder, output, settings, overwrite=overwrite, progress=Progress())
    summary = {"engines": [{"path": str(engine.path), **engine.record.to_json()} for engine in built]}
    emit(summary, "\n\n".join(engine.summary() for engine in built), as_json=as_json)
