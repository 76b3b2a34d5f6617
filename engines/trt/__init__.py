"""TensorRT and TensorRT-RTX: the one place that knows their API."""
