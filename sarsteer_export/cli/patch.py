"""`sarsteer-export patch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sarsteer_export.cli.command import Command, Progress, emit, options
from sarsteer_export.cli.options import FILE, force_option, overflow_option, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path

    from sarsteer_export.patching import PatchSettings

run_time_options = options(
    click.option(
        "--last-from",
        type=click.Choice(["attention_mask", "sequence", "input"]),
        default="attention_mask",
        show_default=True,
        help="Where the last position of a row is read from; `sequence` is wrong for rows padded on the right, "
        "`input` adds the graph input steering_positions [batch].",
    ),
    click.option(
        "--prompt-from",
        type=click.Choice(["past", "input"]),
        default="past",
        show_default=True,
        help="Where the prompt ends: behind a pass without past, or as told in the graph input "
        "steering_prompt_lengths [batch], which chunked prefill and first:N need.",
    ),
    click.option(
        "--strength-input",
        type=click.Choice(["batch", "edits"]),
        help="Add the graph input steering_strength, a factor of the plan's strengths: [batch], or [batch, edits]. "
        "1 where it is not fed; 0 leaves a request as it is.",
    ),
)


@click.command("patch", cls=Command)
@click.argument("decoder", type=FILE)
@click.option(
    "--plan",
    "plans",
    type=FILE,
    required=True,
    multiple=True,
    help="Steering plan (safetensors); may be given several times.",
)
@click.option("--output", "-o", type=FILE, required=True, help="Steered decoder to write.")
@click.option(
    "--combine",
    type=click.Choice(["disjoint", "sequence"]),
    default="disjoint",
    show_default=True,
    help="What several plans do where they meet: refuse, or act one after the other.",
)
@run_time_options
@click.option(
    "--sites",
    type=FILE,
    default=None,
    help="Sites file that says where the blocks are, instead of finding them; `inspect --sites` writes one.",
)
@click.option(
    "--copy",
    is_flag=True,
    help="Give the output its own copy of the weights beside DECODER too, in OUTPUT.data.",
)
@click.option("--replace", is_flag=True, help="Take out the steering that DECODER holds first.")
@click.option("--explain", is_flag=True, help="Say which form every edit takes, why, and what it costs.")
@force_option
@overflow_option
@overwrite_option
def command(
    decoder: Path,
    plans: tuple[Path, ...],
    output: Path,
    explain: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Bake a plan into the ONNX decoder DECODER. Weights are not touched.

    Beside DECODER, the steered graph shares its weights, unless --copy is given; in another folder they are
    copied. A copy is a clone where the filesystem can make one, and never a link.

    \b
    Examples:
      sarsteer-export patch onnx/decoder.onnx --plan plan.safetensors -o onnx/steered.onnx
      sarsteer-export patch onnx/decoder.onnx --plan plan.safetensors -o onnx/steered.onnx --strength-input batch
    """
    from sarsteer_export.explanation import edits_text, explain_edits, explanation_text, shared_nodes
    from sarsteer_export.patching import patch

    settings = patch_settings(**given)
    result = patch(decoder, plans, output, settings, overwrite=overwrite, progress=Progress())
    edits = explain_edits(result)
    lines = [explanation_text(edits, shared_nodes(result)) if explain else edits_text(edits)]
    summary = f"{len(edits)} edits, {len(result.stream.blocks)} blocks -> {output}"
    emit({"output": str(output), "edits": edits}, "\n".join([*lines, summary]), as_json=as_json)


def patch_settings(
    *,
    combine: str,
    last_from: str,
    prompt_from: str,
    strength_input: str | None,
    **given: Any,
) -> PatchSettings:
    """The settings that options of the command line stand for."""
    from calibration.combine import CombineRule
    from graph_passes.selection import LastFrom, PromptFrom, SteeringInputs, StrengthInput
    from sarsteer_export.patching import PatchSettings

    strength = None if strength_input is None else StrengthInput(strength_input)
    inputs = SteeringInputs(LastFrom(last_from), PromptFrom(prompt_from), strength)
    return PatchSettings(inputs, CombineRule(combine), **given)
