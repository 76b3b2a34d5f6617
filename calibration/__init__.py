"""Calibration: from a model and two sets of spoken requests to a steering plan (PyTorch side)."""
