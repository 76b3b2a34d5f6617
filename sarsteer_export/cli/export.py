"""`sarsteer-export export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from sarsteer_export.cli.command import Command, Progress, emit, quiet_transformers
from sarsteer_export.cli.options import (
    FOLDER,
    chosen_model_options,
    device_options,
    model_options,
    overwrite_option,
)


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

    A text-only model has no audio encoder; one that cannot be traced is left out, and the reason is said.

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
    written = {
        field.name: str(path)
        for field in dataclasses.fields(components)
        if isinstance(path := getattr(components, field.name), Path) and path.exists()
    }
    lines = [f"{name:14} {path}" for name, path in written.items()]
    lines += [f"{name:14} not exported: {reason}" for name, reason in components.missing.items()]
    emit({**written, "missing": components.missing}, "\n".join(lines), as_json=as_json)
