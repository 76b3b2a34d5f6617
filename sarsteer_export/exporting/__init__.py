"""Export: from a loaded model to ONNX components with a fixed interface."""
