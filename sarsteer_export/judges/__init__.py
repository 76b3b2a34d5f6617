"""Judges: what tells refusals, answers and degenerate outputs apart. None of them needs torch to be imported."""
