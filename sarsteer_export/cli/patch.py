"""`sarsteer-export patch`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, force_option, overflow_option, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("patch", cls=Command)
@click.argument("decoder", type=FILE)
@click.option("--plan", type=FILE, required=True, help="Steering plan (safetensors).")
@click.option("--output", "-o", type=FILE, required=True, help="Steered decoder to write.")
@click.option(
    "--last-from",
    type=click.Choice(["attention_mask", "sequence"]),
    default="attention_mask",
    show_default=True,
    help="Where the last position of a row is read from; `sequence` is wrong for rows padded on the right.",
)
@force_option
@overflow_option
@overwrite_option
def command(decoder: Path, plan: Path, output: Path, last_from: str, as_json: bool, **given: bool) -> None:
    """Bake a plan into the ONNX decoder DECODER. Weights are not touched.

    Beside DECODER, the steered graph shares its weights; in another folder they are copied.

    \b
    Example:
      sarsteer-export patch onnx/decoder.onnx --plan plan.safetensors -o onnx/steered.onnx
    """
    from graph_passes.patch import LastFrom
    from sarsteer_export.patching import patch

    result = patch(decoder, plan, output, last_from=LastFrom(last_from), **given)
    edits = [dataclasses.asdict(edit) for edit in result.edits]
    lines = [
        f"block {edit.layer:3}  {edit.site.value:18} {edit.op:8} {edit.positions.value:5} at {edit.anchor}"
        for edit in result.edits
    ]
    text = "\n".join([*lines, f"{len(lines)} edits, {len(result.stream.blocks)} blocks -> {output}"])
    emit({"output": str(output), "edits": edits}, text, as_json=as_json)
