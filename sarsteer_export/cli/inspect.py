"""`sarsteer-export inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import ANY_PATH, FILE, overwrite_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("inspect", cls=Command)
@click.argument("path", type=ANY_PATH)
@click.option(
    "--sites",
    type=FILE,
    default=None,
    help="Write the sites of an ONNX decoder as a JSON file to edit, for `patch --sites`.",
)
@overwrite_option
def command(path: Path, sites: Path | None, overwrite: bool, as_json: bool) -> None:
    """Show what is in PATH: a plan (.safetensors), an ONNX file, an engine (.engine), or a bundle folder.

    An engine is described by its sidecar, and opened too where there is a GPU. Where the sites of a decoder are
    not found, --sites writes what is known and the nearest candidates, to be completed by hand.

    \b
    Example:
      sarsteer-export inspect build/pocket_lalm/onnx/decoder_model_merged.onnx
    """
    from sarsteer_export.inspection.inspect import inspect
    from sarsteer_export.inspection.written import with_sites_file

    found = inspect(path)
    if sites is not None:
        found = with_sites_file(found, path, sites, overwrite=overwrite)
    emit(found.content, found.text, as_json=as_json)
