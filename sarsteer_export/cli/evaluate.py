"""`sarsteer-export evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.errors import InputError
from engines.backends import BACKENDS, CPU_BACKEND
from sarsteer_export.cli.command import Command, Progress, emit, quiet_transformers
from sarsteer_export.cli.options import (
    ANY_PATH,
    DATA,
    FOLDER,
    chosen_model_options,
    data_options,
    device_map_option,
    force_option,
    judge_options,
    judge_settings,
    model_options,
    overlap_option,
    overwrite_option,
    read_settings,
)

if TYPE_CHECKING:
    from calibration.model_options import ModelOptions

OF_A_CHECKPOINT = (
    "decoder",
    "final_norm",
    "lm_head",
    "embed_tokens",
    "audio_encoder",
    "projector",
    "adapter",
    "trust_remote_code",
    "device_map",
)
"""The values of `model_options` and `device_map_option`."""


@click.command("evaluate", cls=Command)
@click.argument("target", type=FOLDER, metavar="BUNDLE|MODEL")
@click.option("--harmful", type=ANY_PATH, required=True, help=f"Held-out harmful requests: {DATA}.")
@click.option("--benign", type=ANY_PATH, required=True, help="Held-out benign requests, likewise.")
@data_options
@overlap_option
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="[LABEL=]FILE",
    help="Steering plan to evaluate, with what the report calls it; may be given several times. A bundle's own plan "
    "is always evaluated; a checkpoint without any is measured undefended alone.",
)
@click.option(
    "--model", type=FOLDER, default=None, help="Checkpoint of the bundle, to ask it in PyTorch too."
)
@click.option(
    "--engine",
    type=click.Choice(list(BACKENDS)),
    default=None,
    help="What runs the bundle: one of the engines it was built with, or ONNX Runtime on the CPU.  "
    f"[default: {CPU_BACKEND.name}]",
)
@judge_options
@click.option(
    "--random-seeds",
    default="0,1,2",
    show_default=True,
    help="Seeds of the random-direction control of every plan; `none` leaves it out.",
)
@click.option("--max-new-tokens", default=128, show_default=True, help="Longest answer in tokens.")
@click.option("--batch-size", default=8, show_default=True, help="Requests asked at once.")
@click.option("--bootstrap", default=2000, show_default=True, help="Resamples behind every interval.")
@click.option("--confidence", default=0.95, show_default=True, help="Confidence of every interval.")
@click.option("--limit", type=int, default=None, help="Most requests of each kind; all when left out.")
@click.option("--seed", default=0, show_default=True, help="Seed of the resamples and of the subset.")
@click.option(
    "--device", default="cpu", show_default=True, help="PyTorch device of eager model and classifier."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default=None,
    help="Precision of the eager model.  [default: the bundle's, else float32]",
)
@device_map_option
@model_options
@click.option("--output", "-o", type=FOLDER, default=None, help="Folder to write results and outputs to.")
@force_option
@overwrite_option
def command(target: Path, output: Path | None, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Measure refusals, over-refusals and damage of BUNDLE, a bundle folder, or MODEL, a checkpoint directory.

    Side by side: the undefended model, every plan, and random directions of the same norms; a bundle on its engine
    and, with --model, in PyTorch too, and whether the two agree prompt by prompt. Every figure has its interval.

    \b
    Examples:
      sarsteer-export evaluate build/pocket_lalm --model examples/pocket_lalm/model -o results \\
        --harmful examples/pocket_lalm/data/test_harmful.jsonl \\
        --benign examples/pocket_lalm/data/test_benign.jsonl --allow-overlap transcripts
      sarsteer-export evaluate models/Qwen2-Audio-7B-Instruct --plan SARSteer=plan.safetensors \\
        --harmful harmful.jsonl --benign benign.jsonl --judge-url http://localhost:8000/v1 --judge-model-name judge
    """
    from calibration.overlap import AllowedOverlap
    from sarsteer_export.evaluation.evaluate import evaluate
    from sarsteer_export.evaluation.intervals import Bootstrap
    from sarsteer_export.evaluation.measure import MeasureSettings
    from sarsteer_export.evaluation.settings import EvaluationSettings
    from sarsteer_export.evaluation.written import write_results
    from sarsteer_export.staging import check_output

    if given["limit"] is not None and given["limit"] < 1:
        raise InputError(f"--limit is {given['limit']}; expected at least 1")
    settings = EvaluationSettings(
        loading=loading_of(target, given),
        plans=labelled(given.pop("plans")),
        judge=judge_settings(given),
        data=read_settings(given),
        allow_overlap=AllowedOverlap(given.pop("allow_overlap")),
        random_seeds=parse_seeds(given.pop("random_seeds")),
        measure=MeasureSettings(given.pop("max_new_tokens"), given.pop("batch_size")),
        bootstrap=Bootstrap(given.pop("bootstrap"), given.pop("confidence"), given.pop("seed")),
        **given,
    )
    if output is not None:
        check_output(output, overwrite=overwrite)
    quiet_transformers()
    found = evaluate(target, settings, progress=Progress())
    if output is not None:
        write_results(found, output, overwrite=overwrite)
    emit(found.to_json(), found.table(), as_json=as_json)


def loading_of(target: Path, given: dict[str, Any]) -> ModelOptions | None:
    """Take the values of `model_options` out of `given`; None where no checkpoint is loaded, which needs no PyTorch.

    Raises `InputError` where none is loaded and there is something to be said of it in `given`.
    """
    from sarsteer_export.evaluation.subjects import is_bundle

    if given["model"] is not None or not is_bundle(target):
        return chosen_model_options(given)
    if unused := [name for name in OF_A_CHECKPOINT if given.pop(name)]:
        raise InputError(
            f"--{unused[0].replace('_', '-')} is about a checkpoint; give the bundle's with --model, or leave it out"
        )
    return None


def labelled(plans: tuple[str, ...]) -> dict[str, Path]:
    """Plan files by label from `LABEL=FILE` or `FILE`, whose label is its name without suffix."""
    found: dict[str, Path] = {}
    for plan in plans:
        label, equals, file = plan.partition("=")
        path = Path(file) if equals and not Path(plan).exists() else Path(plan)
        name = label.strip() if path != Path(plan) else path.stem
        if not name or not path.name:
            raise InputError(f"--plan {plan}: expected FILE or LABEL=FILE")
        if name in found:
            raise InputError(
                f"--plan {plan}: the label {name!r} is taken; give it one of its own, as LABEL=FILE"
            )
        found[name] = path
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from `0,1,2`, or none from `none`."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--random-seeds: {text!r} are no numbers; write e.g. 0,1,2, or none") from None
