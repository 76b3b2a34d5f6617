"""`python -m sarsteer_export`: the command line, for launchers that start a module."""

from __future__ import annotations

from sarsteer_export.cli import main

if __name__ == "__main__":
    main(prog_name="sarsteer-export")
