"""`inspect`: what is in a plan, an ONNX file, an engine or a bundle, as JSON and as text."""
