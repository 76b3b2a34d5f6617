"""Engines: build and run ONNX graphs on a runtime, and compare numbers."""
