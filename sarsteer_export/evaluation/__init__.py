"""Evaluation: what undefended, steered and randomly steered models say, on eager PyTorch and on engines."""
