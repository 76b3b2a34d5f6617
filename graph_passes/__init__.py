"""Graph passes: find the residual stream of an ONNX decoder, edit it by reference, check what was done."""
