"""`sarsteer-export build`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from sarsteer_export.cli.command import Command, Progress, emit, quiet_transformers
from sarsteer_export.cli.options import (
    ANY_PATH,
    DATA,
    FILE,
    FOLDER,
    calibration_options,
    calibration_settings,
    chosen_model_options,
    data_options,
    device_options,
    engine_options,
    engine_settings,
    force_option,
    judge_options,
    judge_settings,
    model_options,
    overflow_option,
    overlap_option,
    overwrite_option,
    parity_options,
    resume_option,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command("build", cls=Command)
@click.argument("model", type=FOLDER)
@click.option("--harmful", type=ANY_PATH, required=True, help=f"Harmful spoken requests: {DATA}.")
@click.option("--benign", type=ANY_PATH, required=True, help="Benign spoken requests, likewise.")
@click.option("--output", "-o", type=FOLDER, required=True, help="Bundle folder to write.")
@click.option("--plan", type=FILE, default=None, help="Use this plan instead of calibrating.")
@data_options
@calibration_options
@parity_options
@click.option(
    "--eval-harmful", type=ANY_PATH, default=None, help="Held-out harmful requests to measure behaviour on."
)
@click.option(
    "--eval-benign", type=ANY_PATH, default=None, help="Held-out benign requests to measure behaviour on."
)
@overlap_option
@judge_options
@click.option(
    "--max-new-tokens", default=32, show_default=True, help="Longest answer when behaviour is measured."
)
@click.option(
    "--keep-unsteered/--no-unsteered", default=True, show_default=True, help="Ship the unsteered decoder too."
)
@device_options
@model_options
@engine_options
@overflow_option
@click.option("--dry-run", is_flag=True, help="Say what would happen and what it needs; write nothing.")
@resume_option
@force_option
@overwrite_option
def command(model: Path, output: Path, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Calibrate, export, patch and prove the checkpoint directory MODEL; write a bundle.

    A second build with the same inputs does nothing; with some of them changed (and --overwrite) it reuses
    the finished stages whose inputs are the same.

    \b
    Example:
      sarsteer-export build examples/pocket_lalm/model -o build/pocket_lalm \\
        --harmful examples/pocket_lalm/data/train_harmful.jsonl \\
        --benign examples/pocket_lalm/data/train_benign.jsonl --alpha 0.5 --rank 2
    """
    from calibration.overlap import AllowedOverlap
    from sarsteer_export.building.preview import preview
    from sarsteer_export.building.settings import BuildSettings
    from sarsteer_export.parity_run import ParitySettings
    from sarsteer_export.pipeline import build

    loading = chosen_model_options(given)
    settings = BuildSettings(
        calibration=calibration_settings(model, given, trust_remote_code=loading.trust_remote_code),
        loading=loading,
        parity=ParitySettings(**{name: given.pop(name) for name in ("prompts", "decode_steps", "blocks")}),
        judge=judge_settings(given),
        engine=engine_settings(given),
        allow_overlap=AllowedOverlap(given.pop("allow_overlap")),
        **given,
    )
    if dry_run:
        found = preview(model, output, settings)
        width = max(10, *(len(stage) for stage, _ in found.steps))
        lines = [f"{stage:{width}} {fate}" for stage, fate in found.steps]
        lines.append(f"{'parameters':{width}} {found.parameters / 1e6:,.1f} M")
        lines.append(f"{'disk':{width}} {found.disk_bytes / 1e6:,.1f} MB for the bundle (estimate)")
        lines.append(f"{'memory':{width}} {found.memory_bytes / 1e6:,.1f} MB beside the libraries (estimate)")
        emit(dataclasses.asdict(found), "\n".join(lines), as_json=as_json)
        return
    quiet_transformers()
    result = build(model, output, settings, progress=Progress())
    parts = [result.parity_table]
    if result.behaviour_table is not None:
        parts.append(result.behaviour_table)
    parts += [report["table"] for report in result.engine_behaviour.values()]
    parts += [
        f"engine {entry.label}: {entry.verdict}" + ("" if entry.reason is None else f" ({entry.reason})")
        for entry in result.engines
    ]
    if result.reused:
        parts.append(f"reused: {', '.join(result.reused)}")
    parts.append(f"bundle: {result.path}")
    summary = {
        "bundle": str(result.path),
        "parity": result.parity,
        "behaviour": result.behaviour,
        "engines": [dataclasses.asdict(entry) for entry in result.engines],
        "engine_behaviour": result.engine_behaviour,
        "reused": list(result.reused),
        "data": result.data,
    }
    emit(summary, "\n\n".join(parts), as_json=as_json)
