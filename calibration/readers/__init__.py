"""Readers of the formats in `docs/data.md`, one a module; each turns a path into records."""
