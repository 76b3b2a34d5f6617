"""`sarsteer-export patch`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, force_option, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("patch", cls=Command)
@click.argument("decoder", type=FILE)
@click.option("--plan", type=FILE, required=True, help="Steering plan (safetensors).")
@click.option("--output", "-o", type=FILE, required=True, help="Steered decoder to write.")
@click.option(
    "--last-from",
    type=click.Choice(["attention_mask", "sequence", "input"]),
    default="attention_mask",
    show_default=True,
    help="Where the last position of a row is read from; `sequence` is wrong for rows padded on the right, `input` "
    "adds the graph input steering_positions [batch].",
)
@click.option(
    "--prompt-from",
    type=click.Choice(["past", "input"]),
    default="past",
    show_default=True,
    help="Where the prompt ends: behind a pass without past, or as told in the graph input "
    "steering_prompt_lengths [batch], which chunked prefill and first:N need.",
)
@click.option(
    "--strength-input",
    type=click.Choice(["batch", "edits"]),
    help="Add the graph input steering_strength, a factor of the plan's strengths: [batch], or [batch, edits]. "
    "1 where it is not fed; 0 leaves a request as it is.",
)
@force_option
@overwrite_option
def command(
    decoder: Path,
    plan: Path,
    output: Path,
    last_from: str,
    prompt_from: str,
    strength_input: str | None,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Bake a plan into the ONNX decoder DECODER. Weights are not touched.

    Beside DECODER, the steered graph shares its weights; in another folder they are copied.

    \b
    Example:
      sarsteer-export patch onnx/decoder.onnx --plan plan.safetensors -o onnx/steered.onnx
    """
    from graph_passes.selection import LastFrom, PromptFrom, SteeringInputs, StrengthInput
    from sarsteer_export.patching import patch

    inputs = SteeringInputs(
        LastFrom(last_from),
        PromptFrom(prompt_from),
        None if strength_input is None else StrengthInput(strength_input),
    )
    result = patch(decoder, plan, output, force=force, inputs=inputs, overwrite=overwrite)
    edits = [dataclasses.asdict(edit) for edit in result.edits]
    lines = [
        f"block {edit.layer:3}  {edit.site.value:18} {edit.op:8} {edit.positions:9} at {edit.anchor}"
        for edit in result.edits
    ]
    text = "\n".join([*lines, f"{len(lines)} edits, {len(result.stream.blocks)} blocks -> {output}"])
    emit({"output": str(output), "edits": edits}, text, as_json=as_json)
