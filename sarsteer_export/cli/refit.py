"""`sarsteer-export refit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, force_option, overflow_option, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("refit", cls=Command)
@click.argument("steered", type=FILE)
@click.option("--plan", type=FILE, required=True, help="New steering plan (safetensors), of the same edits.")
@click.option("--output", "-o", type=FILE, help="File to write; STEERED itself is replaced when left out.")
@force_option
@overflow_option
@overwrite_option
def command(steered: Path, plan: Path, output: Path | None, as_json: bool, **given: bool) -> None:
    """Swap the steering of STEERED, a steered ONNX file or an engine, for that of another plan.

    Only the values of the steering constants change: strengths, vectors, bases and means. The new plan must
    have the same edits, at the same layers, sites and positions. Weights are not touched: beside an ONNX file,
    the output shares them; in another folder they are copied. An engine must have been built to be refitted,
    which its sidecar says, and needs its GPU. Nothing is written into a bundle.

    \b
    Examples:
      sarsteer-export refit onnx/steered.onnx --plan stronger.safetensors
      sarsteer-export refit build/engines/decoder.engine --plan stronger.safetensors -o build/stronger.engine
      sarsteer-export refit bundle/onnx/decoder_model_merged.onnx --plan new.safetensors -o new/steered.onnx
    """
    from sarsteer_export.refitting import refit

    result = refit(steered, plan, output, **given)
    content = {
        "output": str(result.output),
        "plan_sha256": result.plan_sha256,
        "constants": list(result.constants),
    }
    summary = (
        f"{len(result.constants)} constants of plan {result.plan_sha256[:12]} replaced -> {result.output}"
    )
    emit(content, "\n".join([*result.constants, summary]), as_json=as_json)
