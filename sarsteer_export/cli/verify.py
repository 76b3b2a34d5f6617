"""`sarsteer-export verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from calibration.errors import ParityError, UnsupportedError
from sarsteer_export.cli.command import Command, Progress, emit, quiet_transformers
from sarsteer_export.cli.options import (
    ANY_PATH,
    DATA,
    FILE,
    FOLDER,
    chosen_model_options,
    data_options,
    engine_option,
    model_options,
    overwrite_option,
    parity_options,
    read_settings,
)

if TYPE_CHECKING:
    from pathlib import Path


@click.command("verify", cls=Command)
@click.argument("bundle", type=FOLDER)
@click.option("--model", type=FOLDER, required=True, help="Checkpoint the bundle was made from.")
@click.option("--requests", type=ANY_PATH, required=True, help=f"Spoken requests to compare on: {DATA}.")
@click.option("--report", type=FILE, default=None, help="Write the report to a .json or .html file.")
@data_options
@engine_option
@parity_options
@model_options
@overwrite_option
def command(
    bundle: Path,
    model: Path,
    requests: Path,
    report: Path | None,
    engine: str,
    prompts: int,
    decode_steps: int,
    blocks: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Run parity again: the bundle folder BUNDLE against the eager model, with negative controls.

    \b
    Example:
      sarsteer-export verify build/pocket_lalm --model examples/pocket_lalm/model \\
        --requests examples/pocket_lalm/data/test_harmful.jsonl
    """
    from engines.report import Verdict
    from sarsteer_export.parity_run import ParitySettings
    from sarsteer_export.report_page import parity_page
    from sarsteer_export.staging import check_output, staged_file
    from sarsteer_export.verification import verify

    if report is not None:
        if report.suffix not in (".json", ".html"):
            raise click.BadParameter(
                f"{report}: expected a name that ends in .json or .html", param_hint="--report"
            )
        check_output(report, overwrite=overwrite)
    quiet_transformers()
    settings = ParitySettings(prompts, decode_steps, blocks, backend=engine)
    loading, data = chosen_model_options(given), read_settings(given)
    found = verify(bundle, model, requests, settings, loading=loading, data=data, progress=Progress())
    content = found.to_json() | {"table": found.table()}
    if report is not None:
        page = parity_page(content) if report.suffix == ".html" else json.dumps(content, indent=2) + "\n"
        with staged_file(report, overwrite=overwrite) as staged:
            staged.write_text(page, encoding="utf-8")
    if found.verdict is Verdict.NOT_EXECUTED:
        raise UnsupportedError(found.notes[0])
    emit(content, found.table(), as_json=as_json)
    if found.verdict is not Verdict.PASSED:
        raise ParityError("parity failed:\n  " + "\n  ".join(found.failures()))
