"""Decoder graphs that compute what others do, written so that their residual stream is not found."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_passes.residual_stream import find_residual_stream


def disguise_residual_adds(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every residual add is a ReduceSum over a Concat; the sums keep their names and values.

    ReduceSum over two terms is one addition, so that outputs stay equal to the bit. For graphs of opset 13 on.
    """
    adds = {name for block in find_residual_stream(model).blocks for name in block.adds}
    disguised = onnx.ModelProto()
    disguised.CopyFrom(model)
    del disguised.graph.node[:]
    for node in model.graph.node:
        if f"{node.op_type} {node.name!r}" not in adds:
            disguised.graph.node.append(node)
            continue
        stem, (total,) = node.output[0], node.output
        for side, name in enumerate(node.input):
            disguised.graph.node.append(
                helper.make_node("Unsqueeze", [name, "disguise.axis"], [f"{stem}.{side}"], f"{stem}.{side}")
            )
        disguised.graph.node.append(
            helper.make_node("Concat", [f"{stem}.0", f"{stem}.1"], [f"{stem}.both"], f"{stem}.both", axis=0)
        )
        disguised.graph.node.append(
            helper.make_node(
                "ReduceSum", [f"{stem}.both", "disguise.axis"], [total], f"{stem}.reduce", keepdims=0
            )
        )
    disguised.graph.initializer.append(numpy_helper.from_array(np.array([0]), "disguise.axis"))
    return disguised
