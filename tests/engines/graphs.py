"""A decoder of three nodes, made by hand: what goes in, comes out and stays in the cache can be read off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 4
"""Width of the stream; the cache has one head of this width, the vocabulary as many tokens."""


def decoder_graph(*, weights: Path | None = None) -> onnx.ModelProto:
    """present = past followed by the embeddings; logits = (embeddings + mean of present) times a matrix.

    Embeddings (batch, sequence, 4), cache (batch, 1, past, 4). With `weights`, the matrix lies in that file.
    """
    matrix = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH) / 10
    constant = numpy_helper.from_array(matrix, "matrix")
    if weights is not None:
        weights.write_bytes(matrix.tobytes())
        constant.ClearField("raw_data")
        constant.data_location = TensorProto.EXTERNAL
        entry = constant.external_data.add()
        entry.key, entry.value = "location", weights.name
    nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "one"], ["heads"]),
        helper.make_node("Concat", ["past_key_values.0.key", "heads"], ["present.0.key"], axis=2),
        helper.make_node("ReduceMean", ["present.0.key", "two"], ["mean"], keepdims=0),
        helper.make_node("Add", ["inputs_embeds", "mean"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "matrix"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hand",
        [
            _value("inputs_embeds", ["batch", "sequence", WIDTH]),
            _value("past_key_values.0.key", ["batch", 1, "past", WIDTH]),
        ],
        [
            _value("logits", ["batch", "sequence", WIDTH]),
            _value("present.0.key", ["batch", 1, "total", WIDTH]),
        ],
        [
            numpy_helper.from_array(np.array([axis], dtype=np.int64), name)
            for name, axis in (("one", 1), ("two", 2))
        ]
        + [constant],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _value(name: str, dims: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
