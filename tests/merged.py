"""Merged decoders as Optimum writes them: one `If` around two bodies that both compute the decoder."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def merge_with_itself(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file whose `If` chooses between two bodies, each all nodes of `model`; weights stay outside the bodies."""
    merged = onnx.ModelProto()
    merged.CopyFrom(model)
    graph = merged.graph
    body = helper.make_graph(list(model.graph.node), "body", [], list(model.graph.output))
    branch = helper.make_node(
        "If",
        ["use_cache_branch"],
        [f"{value.name}.chosen" for value in graph.output],
        name="merged",
        then_branch=body,
        else_branch=body,
    )
    del graph.node[:]
    graph.node.append(branch)
    for value in graph.output:
        value.name += ".chosen"
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    return merged
