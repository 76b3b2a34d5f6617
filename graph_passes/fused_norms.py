"""Take residual adds out of the norms that runtimes fuse them with, so that the stream between can be edited.

`SkipSimplifiedLayerNormalization(x, branch, scale)` computes `x + branch` and its norm at once; the sum is
its optional fourth output. ONNX Runtime GenAI and ONNX Runtime's optimiser write such nodes. Here the sum
moves into an `Add` of its own, and the fused node reads it beside −0 in place of the branch: x + (−0) is x
for every x, so the same kernel computes the same norm to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import ModelProto, NodeProto, helper

from calibration.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection

WEIGHTS = {"SkipSimplifiedLayerNormalization": 1, "SkipLayerNormalization": 2}
"""Fused operator -> how many weights of its norm (scale, bias) follow the two summands."""
SUM_OUTPUT = 3
"""Which output of the fused operators is the sum."""
SUM_SUFFIX = ".sum"
ZEROS = "sarsteer.zeros"
"""Names of tensors of −0 in the shape of the stream (B, S, D) start with this."""


def is_fused(node: NodeProto) -> bool:
    """Whether a node is a residual add fused with the norm behind it, and was not split yet."""
    return node.op_type in WEIGHTS and not node.input[1].startswith(ZEROS)


def sum_name(node: NodeProto) -> str:
    """The name of the sum a fused node computes: its fourth output, or a new name where it has none."""
    if len(node.output) > SUM_OUTPUT and node.output[SUM_OUTPUT]:
        return str(node.output[SUM_OUTPUT])
    return node.output[0] + SUM_SUFFIX


def fused_sums(model: ModelProto) -> dict[str, NodeProto]:
    """The fused node behind each sum that `split_fused_norms` takes out of one."""
    found: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if is_fused(node):
            found[sum_name(node)] = found[sum_name(node) + ".unbiased"] = node
    return found


def split_fused_norms(model: ModelProto, sums: Collection[str] | None = None) -> ModelProto:
    """A copy of `model` in which fused nodes read a sum that an `Add` computes.

    `sums`: names of the sums to split at; all of them when left out. Without any to split, `model` itself.
    """
    chosen = {
        position
        for position, node in enumerate(model.graph.node)
        if is_fused(node) and (sums is None or sum_name(node) in sums)
    }
    if not chosen:
        return model
    split = ModelProto()
    split.CopyFrom(model)
    first, zeros = min(chosen), _free_name(model)
    nodes: list[NodeProto] = []
    for position, node in enumerate(model.graph.node):
        if position not in chosen:
            nodes.append(node)
            continue
        adds, norm = _split(node, zeros)
        nodes += adds
        if position == first:
            nodes += _zeros(zeros, sum_name(node), _elem_type(model, node))
        nodes.append(norm)
    del split.graph.node[:]
    split.graph.node.extend(nodes)
    return split


def _split(node: NodeProto, zeros: str) -> tuple[list[NodeProto], NodeProto]:
    total = sum_name(node)
    hidden, branch, *rest = node.input
    weights, biases = rest[: WEIGHTS[node.op_type]], [name for name in rest[WEIGHTS[node.op_type] :] if name]
    summed = total + ".unbiased" if biases else total
    adds = [helper.make_node("Add", [hidden, branch], [summed], name=f"{node.name}/sum")]
    adds += [helper.make_node("Add", [summed, bias], [total], name=f"{node.name}/bias") for bias in biases]
    norm = NodeProto()
    norm.CopyFrom(node)
    del norm.input[:], norm.output[SUM_OUTPUT:]
    norm.input.extend([total, zeros, *weights])
    return adds, norm  # the metadata stays with the norm: its module scope is the next block's


def _zeros(name: str, like: str, elem_type: int) -> list[NodeProto]:
    value = helper.make_tensor(f"{name}.value", elem_type, [1], [-0.0])
    return [
        helper.make_node("Shape", [like], [f"{name}.shape"], name=f"{name}.shape"),
        helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], name=name, value=value),
    ]


def _free_name(model: ModelProto) -> str:
    taken = {name for node in model.graph.node for name in node.output}
    name, number = ZEROS, 0
    while name in taken:
        number += 1
        name = f"{ZEROS}.{number}"
    return name


def _elem_type(model: ModelProto, node: NodeProto) -> int:
    """The stream's element type: that of the norm's scale."""
    for tensor in model.graph.initializer:
        if tensor.name == node.input[2]:
            return int(tensor.data_type)
    raise UnsupportedError(f"{node.op_type} {node.name!r}: its scale is no initializer; expected a constant")
