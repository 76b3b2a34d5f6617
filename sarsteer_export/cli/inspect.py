"""`sarsteer-export inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from calibration.errors import InputError
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
@click.option(
    "--svg", type=FILE, default=None, help="Draw a block of an ONNX decoder, before and after steering."
)
@click.option(
    "--block",
    type=int,
    default=None,
    help="Block to draw.  [default: the first that is steered, else block 0]",
)
@overwrite_option
def command(
    path: Path, sites: Path | None, svg: Path | None, block: int | None, overwrite: bool, as_json: bool
) -> None:
    """Show what is in PATH: a plan (.safetensors), an ONNX file, an engine (.engine), or a bundle folder.

    Also the statistics that `sweep` keeps (.safetensors), and files of other tools that `convert` reads: .gguf, .svec,
    .pt and .pth.

    Of a decoder: a table of its residual stream, what reads it, and the edits in the order in which they act.
    Where its sites are not found, --sites writes what is known and the nearest candidates, to be completed by
    hand; a merged decoder has a table for each of its bodies, and no such file. An engine is described by its
    sidecar, and opened too where there is a GPU.

    \b
    Example:
      sarsteer-export inspect build/pocket_lalm/onnx/decoder_model_merged.onnx --svg block.svg --block 3
    """
    from sarsteer_export.inspection.inspect import inspect
    from sarsteer_export.inspection.written import FilesToWrite, check_outputs, with_files

    if block is not None and svg is None:
        raise InputError("--block says which block to draw; name a picture with --svg")
    found = inspect(path)
    check_outputs(path, [output for output in (svg, sites) if output is not None], overwrite=overwrite)
    found = with_files(found, path, FilesToWrite(sites, svg, block), overwrite=overwrite)
    emit(found.content, found.text, as_json=as_json)
