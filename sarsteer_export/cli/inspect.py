"""`sarsteer-export inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import ANY_PATH

if TYPE_CHECKING:
    from pathlib import Path


@click.command("inspect", cls=Command)
@click.argument("path", type=ANY_PATH)
def command(path: Path, as_json: bool) -> None:
    """Show what is in PATH: a plan (.safetensors), an ONNX file, an engine (.engine), or a bundle folder.

    An engine is described by its sidecar, and opened too where there is a GPU.

    \b
    Example:
      sarsteer-export inspect build/pocket_lalm/onnx/decoder_model_merged.onnx
    """
    from sarsteer_export.inspection.inspect import inspect

    found = inspect(path)
    emit(found.content, found.text, as_json=as_json)
