"""`sarsteer-export run`. Imports no torch: what it needs is in the bundle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from sarsteer_export.cli.command import Command, emit
from sarsteer_export.cli.options import FILE, FOLDER, engine_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("run", cls=Command)
@click.argument("bundle", type=FOLDER)
@click.option("--audio", type=FILE, default=None, help="Spoken request; left out, the text alone is asked.")
@click.option("--text", required=True, help="Text prompt that goes with it.")
@click.option("--steering/--no-steering", default=True, help="Use the steered or the unsteered decoder.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Longest answer in tokens.")
@engine_option
def command(
    bundle: Path,
    audio: Path | None,
    text: str,
    steering: bool,
    max_new_tokens: int,
    engine: str,
    as_json: bool,
) -> None:
    """Answer a spoken request from the bundle folder BUNDLE, streaming, greedily.

    \b
    Example:
      sarsteer-export run build/pocket_lalm --audio clip.flac --text "please respond to the audio."
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    from sarsteer_export.bundle.bundle import load_bundle

    with load_bundle(bundle, engine=engine) as opened:
        pieces = opened.stream(audio, text, max_new_tokens=max_new_tokens, steering=steering)
        if as_json:
            emit({"answer": "".join(pieces), "steering": steering}, "", as_json=True)
            return
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
