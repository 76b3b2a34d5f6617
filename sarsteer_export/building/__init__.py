"""`build`, whose steps stand in `pipeline.py`: its settings and inputs, what it reuses, needs, and leaves."""
