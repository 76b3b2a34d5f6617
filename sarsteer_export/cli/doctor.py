"""`sarsteer-export doctor`."""

from __future__ import annotations

import click

from sarsteer_export.cli.command import Command, emit


@click.command("doctor", cls=Command)
def command(as_json: bool) -> None:
    """Show what this machine can build and run, and what to do about what it cannot.

    The libraries are tried, not only listed: each runtime builds or runs a graph of one node in a process of its
    own. Ends with 0 whatever was found.

    \b
    Example:
      sarsteer-export doctor --json
    """
    from sarsteer_export.doctor import examine

    diagnosis = examine()
    emit(diagnosis.to_json(), diagnosis.table(), as_json=as_json)
