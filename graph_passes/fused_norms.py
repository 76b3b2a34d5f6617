"""Take residual adds out of the norms that runtimes fuse them with, so that the stream between can be edited.

`SkipSimplifiedLayerNormalization(x, branch, scale)` computes `x + branch` and its norm at once; the sum is
its optional fourth output. ONNX Runtime GenAI and ONNX Runtime's optimiser write such nodes. Here the sum
moves into an `Add` of its own, and the fused node reads it beside −0 in place of the branch: x + (−0) is x
for every x, so the same kernel computes the same norm to the bit.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, helper

from calibration.errors import InputError, UnsupportedError
from graph_passes.names import UNSTEERED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Collection

WEIGHTS = {"SkipSimplifiedLayerNormalization": 1, "SkipLayerNormalization": 2}
"""Fused operator -> how many weights of its norm (scale, bias) follow the two summands."""
SUM_OUTPUT = 3
"""Which output of the fused operators is the sum."""
SUM_SUFFIX = ".sum"
ZEROS = "sarsteer.zeros"
"""Names of tensors of −0 in the shape of the stream (B, S, D) start with this."""
ORIGINAL_KEY = "sarsteer.original"
"""Metadata entry of a split norm: the node it was, serialized, in base64."""
ADDED_KEY = "sarsteer.split_from"
"""Metadata entry of a sum taken out of a norm: that norm's name."""


def is_fused(node: NodeProto) -> bool:
    """Whether a node is a residual add fused with the norm behind it, and was not split yet."""
    return node.op_type in WEIGHTS and not node.input[1].startswith(ZEROS)


def sum_name(node: NodeProto) -> str:
    """The name of the sum a fused node computes: its fourth output, or a new name where it has none."""
    if len(node.output) > SUM_OUTPUT and node.output[SUM_OUTPUT]:
        return str(node.output[SUM_OUTPUT])
    return (
        node.output[0].removeprefix(UNSTEERED_PREFIX) + SUM_SUFFIX
    )  # an edited norm keeps the name of its sum


def bias_slot(node: NodeProto) -> int:
    """Which input of a fused node is its bias, which is added after both summands."""
    return 2 + WEIGHTS[node.op_type]


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
    if not _chosen(model.graph, sums):
        return model
    split = ModelProto()
    split.CopyFrom(model)
    split_in_place(split.graph, split.graph, sums)
    return split


def split_in_place(graph: GraphProto, outermost: GraphProto, sums: Collection[str] | None = None) -> None:
    """Split the fused nodes of a graph at some sums, or at all; `outermost` holds the norms' scales.

    Every node that is changed or added says in its metadata what it was, so that `join_fused_norms` can undo it.
    """
    chosen = _chosen(graph, sums)
    if not chosen:
        return
    first, zeros = min(chosen), _free_name(graph)
    nodes: list[NodeProto] = []
    for position, node in enumerate(graph.node):
        if position not in chosen:
            nodes.append(node)
            continue
        adds, norm = _split(node, zeros)
        nodes += adds
        if position == first:
            nodes += _zeros(zeros, sum_name(node), _elem_type(outermost, node))
        nodes.append(norm)
    rewritten = GraphProto()
    rewritten.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(rewritten.node)


def join_fused_norms(graph: GraphProto) -> None:
    """Undo `split_in_place`: fused nodes are again what they were, the sums before them are gone."""
    nodes = []
    for node in graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}
        if ADDED_KEY in said:
            continue
        if ORIGINAL_KEY in said:
            nodes.append(kept_node(said[ORIGINAL_KEY]))
        else:
            nodes.append(node)
    rewritten = GraphProto()
    rewritten.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(rewritten.node)


def kept_node(text: str) -> NodeProto:
    """The node that a metadata entry keeps. Raises `InputError` when it keeps none."""
    try:
        return NodeProto.FromString(base64.b64decode(text, validate=True))
    except (DecodeError, ValueError) as error:
        raise InputError(
            f"the graph was altered after patching: its metadata keeps no node where one was replaced ({error})"
        ) from error


def _chosen(graph: GraphProto, sums: Collection[str] | None) -> set[int]:
    return {
        position
        for position, node in enumerate(graph.node)
        if is_fused(node) and (sums is None or sum_name(node) in sums)
    }


def _split(node: NodeProto, zeros: str) -> tuple[list[NodeProto], NodeProto]:
    total = sum_name(node)
    hidden, branch, *rest = node.input
    weights, biases = rest[: WEIGHTS[node.op_type]], [name for name in rest[WEIGHTS[node.op_type] :] if name]
    summed = total + ".unbiased" if biases else total
    adds = [helper.make_node("Add", [hidden, branch], [summed], name=f"{node.name}/sum")]
    adds += [helper.make_node("Add", [summed, bias], [total], name=f"{node.name}/bias") for bias in biases]
    for add in adds:
        add.metadata_props.add(key=ADDED_KEY, value=node.name)
    norm = NodeProto()
    norm.CopyFrom(node)
    del norm.input[:], norm.output[SUM_OUTPUT:]
    norm.input.extend([total, zeros, *weights])
    original = base64.b64encode(node.SerializeToString(deterministic=True)).decode()
    norm.metadata_props.add(key=ORIGINAL_KEY, value=original)
    return adds, norm  # the metadata stays with the norm: its module scope is the next block's


def _zeros(name: str, like: str, elem_type: int) -> list[NodeProto]:
    value = helper.make_tensor(f"{name}.value", elem_type, [1], [-0.0])
    return [
        helper.make_node("Shape", [like], [f"{name}.shape"], name=f"{name}.shape"),
        helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], name=name, value=value),
    ]


def _free_name(graph: GraphProto) -> str:
    taken = {name for node in graph.node for name in node.output}
    name, number = ZEROS, 0
    while name in taken:
        number += 1
        name = f"{ZEROS}.{number}"
    return name


def _elem_type(graph: GraphProto, node: NodeProto) -> int:
    """The stream's element type: that of the norm's scale."""
    for tensor in graph.initializer:
        if tensor.name == node.input[2]:
            return int(tensor.data_type)
    raise UnsupportedError(f"{node.op_type} {node.name!r}: its scale is no initializer; expected a constant")
