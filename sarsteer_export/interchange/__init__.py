"""Steering vectors of other tools, to and from plans: one module a format. See `docs/interchange.md`."""
