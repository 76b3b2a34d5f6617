"""`sarsteer-export export`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from sarsteer_export.cli.command import Command, Progress, emit, quiet_transformers
from sarsteer_export.cli.options import (
    FOLDER,
    chosen_model_options,
    device_options,
    model_options,
    overwrite_option,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command("export", cls=Command)
@click.argument("model", type=FOLDER)
@click.option("--output", "-o", type=FOLDER, required=True, help="Folder to write.")
@device_options
@model_options
@overwrite_option
def command(
    model: Path, output: Path, device: str, dtype: str, overwrite: bool, as_json: bool, **given: Any
) -> None:
    """Export the checkpoint directory MODEL to ONNX, unsteered: decoder, audio encoder, token embedding.

    \b
    Example:
      sarsteer-export export models/Qwen2-Audio-7B-Instruct -o onnx/
    """
    from sarsteer_export.exporting.export import export
    from sarsteer_export.staging import check_output

    check_output(output, overwrite=overwrite)
    quiet_transformers()
    components = export(
        model,
        output,
        device=device,
        dtype=dtype,
        loading=chosen_model_options(given),
        overwrite=overwrite,
        progress=Progress(),
    )
    paths = {name: str(path) for name, path in dataclasses.asdict(components).items()}
    emit(paths, "\n".join(f"{name:14} {path}" for name, path in paths.items()), as_json=as_json)
