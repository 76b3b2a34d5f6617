"""`sarsteer-export calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import numpy as np

from calibration.errors import InputError
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
    device_map_option,
    device_options,
    model_options,
    overwrite_option,
    resume_option,
)
from sarsteer_export.staging import check_output, staged_file

if TYPE_CHECKING:
    from pathlib import Path


@click.command("calibrate", cls=Command)
@click.argument("model", type=FOLDER)
@click.option("--harmful", type=ANY_PATH, required=True, help=f"Harmful spoken requests: {DATA}.")
@click.option("--benign", type=ANY_PATH, required=True, help="Benign spoken requests, likewise.")
@click.option("--output", "-o", type=FILE, required=True, help="Plan to write (safetensors).")
@data_options
@calibration_options
@device_options
@device_map_option
@resume_option
@model_options
@overwrite_option
def command(
    model: Path,
    harmful: Path,
    benign: Path,
    output: Path,
    device: str,
    dtype: str,
    device_map: str | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compute the steering plan of the checkpoint directory MODEL from spoken requests.

    The same command goes on with an interrupted run. Started by torchrun or accelerate launch (as
    "torchrun --nproc-per-node 4 -m sarsteer_export calibrate ..."), all processes share the requests, and the
    first writes the plan.

    \b
    Example:
      sarsteer-export calibrate models/Qwen2-Audio-7B-Instruct \\
        --harmful data/harmful.jsonl --benign data/benign.jsonl -o plan.safetensors
    """
    from calibration.calibrate import CalibrationRun, calibrate, unfinished_of
    from calibration.processes import started_processes
    from calibration.unfinished import UnfinishedFile

    with started_processes() as processes:
        if device_map is not None and processes.count > 1:
            raise InputError(
                f"--device-map spreads one model over all devices; {processes.count} processes would each do so; "
                "use --device cuda, or one process"
            )
        loading = chosen_model_options(given)
        settings = calibration_settings(model, given, trust_remote_code=loading.trust_remote_code)
        check_output(output, overwrite=overwrite)
        quiet_transformers()
        plan = calibrate(
            model,
            harmful,
            benign,
            settings,
            device=device,
            dtype=dtype,
            loading=loading,
            progress=Progress(),
            run=CalibrationRun(device_map, unfinished_of(output), resume, processes),
        )
        if processes.first:
            with staged_file(output, overwrite=overwrite) as staged:
                plan.save(staged)
            UnfinishedFile(unfinished_of(output), {}).remove()
    if not processes.first:
        return
    norms = {edit.layer: float(np.linalg.norm(edit.tensors()["vector"])) for edit in plan.edits}
    result = {
        "plan": str(output),
        "sha256": plan.digest(),
        "edits": len(plan.edits),
        "vector_norms": norms,
        "provenance": plan.provenance,
    }
    lines = [f"block {layer:3}  |v| {norm:.4g}" for layer, norm in norms.items()]
    emit(result, "\n".join([*lines, f"{len(norms)} edits -> {output}"]), as_json=as_json)
