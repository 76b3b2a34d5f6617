"""`sarsteer-export unpatch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("unpatch", cls=Command)
@click.argument("steered", type=FILE)
@click.option("--output", "-o", type=FILE, required=True, help="Unsteered decoder to write.")
@overwrite_option
def command(steered: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Take the steering out of STEERED, an ONNX decoder that `patch` steered.

    What is written is the graph before `patch`, field by field. Weights are not touched: beside STEERED, the output
    shares them; in another folder they are copied.

    \b
    Example:
      sarsteer-export unpatch onnx/steered.onnx -o onnx/decoder.onnx
    """
    from sarsteer_export.patching import unpatch

    unpatch(steered, output, overwrite=overwrite)
    emit({"output": str(output)}, f"steering taken out -> {output}", as_json=as_json)
