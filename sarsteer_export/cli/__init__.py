"""The command line: `sarsteer-export COMMAND`. Each command's module is imported when it is called for."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

INTERRUPTED = 130
COMMANDS = {
    "build": "Calibrate, export, patch and prove a model; write a bundle.",
    "calibrate": "Compute the steering plan of a model from spoken requests.",
    "export": "Export a model to ONNX, unsteered.",
    "convert": "Convert plans to and from the vector files of other tools.",
    "patch": "Bake a plan into an ONNX decoder.",
    "unpatch": "Take the steering out of a steered ONNX decoder.",
    "build-engine": "Build TensorRT engines of an ONNX file.",
    "refit": "Swap the steering of a steered ONNX file or engine.",
    "verify": "Run parity again from a bundle and its checkpoint.",
    "evaluate": "Measure refusals, over-refusals and damage, with intervals.",
    "sweep": "Choose strength, rank and layers under a limit of damage.",
    "audit": "Say whether a file holds a plan, unaltered.",
    "inspect": "Show what is in a plan, an ONNX file, an engine or a bundle.",
    "run": "Answer a spoken request from a bundle.",
    "doctor": "Show what this machine can build and run.",
}
"""Every command with its one-line help, in the order of the pipeline."""


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own name and are imported on use."""

    def list_commands(self, _context: click.Context) -> list[str]:
        """The commands, in pipeline order."""
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """Import a command's module and return its `command`."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"sarsteer_export.cli.{name.replace('-', '_')}").command
        return command

    def invoke(self, context: click.Context) -> Any:
        """Run the group; Ctrl-C while a command is still being imported ends as it does later."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("Error: interrupted; nothing was written", err=True)
            context.exit(INTERRUPTED)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("sarsteer-export"), prog_name="sarsteer-export")
def main() -> None:
    """Bake SARSteer activation steering into ONNX decoders of audio-language models, and prove it.

    \b
    Exit codes: 0 done; 2 wrong input or usage; 3 unsupported here; 4 no steering site
    found; 5 engine build failed; 6 parity or audit failed, or no setting of a sweep is
    usable; 130 interrupted.
    """
