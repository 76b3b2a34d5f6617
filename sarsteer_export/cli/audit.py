"""`sarsteer-export audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from calibration.errors import AuditError
from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import ANY_PATH, FILE

if TYPE_CHECKING:
    from pathlib import Path


@click.command("audit", cls=Command)
@click.argument("path", type=ANY_PATH)
@click.option(
    "--plan",
    "plans",
    type=FILE,
    multiple=True,
    help="Steering plan (safetensors) that PATH must hold; several act one after another. Without one, what stands on "
    "the residual stream is listed.",
)
@click.option(
    "--last-from",
    type=click.Choice(["attention_mask", "sequence", "input"]),
    default=None,
    help="Where the last position must be read from.  [default: the graph's input for it where it has one, else its "
    "attention mask, else the last column]",
)
@click.option(
    "--on-paper",
    is_flag=True,
    help="Take the sidecar's word for an engine whose ONNX file is not there to be read.",
)
def command(
    path: Path, plans: tuple[Path, ...], last_from: str | None, on_paper: bool, as_json: bool
) -> None:
    """Say whether PATH, an ONNX file, a bundle folder or an engine, holds a plan, completely and unaltered.

    Constants and wiring are read back from the graph alone: neither names nor metadata are trusted. Each edit is
    present, missing, altered or bypassed; unless all are present and nothing else stands on the residual stream, the
    exit code is 6. An engine is audited by its sidecar and by the ONNX file that it was built from.

    \b
    Examples:
      sarsteer-export audit onnx/steered.onnx --plan plan.safetensors
      sarsteer-export audit build/pocket_lalm --plan plan.safetensors --json
      sarsteer-export audit onnx/unknown.onnx
    """
    from graph_passes.selection import LastFrom
    from sarsteer_export.auditing import audit

    told = None if last_from is None else LastFrom(last_from)
    report = audit(path, plans or None, last_from=told, on_paper=on_paper)
    emit(report.to_json(), report.table(), as_json=as_json)
    if not report.passed:
        first, *others = report.failures()
        more = f"; and {len(others)} more" if others else ""
        raise AuditError(f"{path}: audit failed: {first}{more}")
