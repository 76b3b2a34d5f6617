"""Nodes that hand on a tensor's values: casts, other shapes, Q/DQ pairs, scales; and walking back over them.

A Q/DQ pair is a `QuantizeLinear` and the `DequantizeLinear` behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_passes.names import is_steering

if TYPE_CHECKING:
    from onnx import NodeProto

    from graph_passes.graph_index import GraphIndex

TRANSPARENT_OPS = frozenset({"Cast", "Identity"})
FORM_OPS = TRANSPARENT_OPS | {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
"""What changes the form of a tensor and none of its values."""
QDQ_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})
QUANTISING_OPS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
"""What makes integers of a float tensor, its first input."""


def handed_on(index: GraphIndex, node: NodeProto) -> str | None:
    """The tensor whose values `node` hands on; None where it computes others.

    A `DequantizeLinear` hands on what a `QuantizeLinear` before it has rounded; that of a weight hands on nothing.
    """
    if node.op_type in TRANSPARENT_OPS:
        return str(node.input[0])
    if node.op_type == "DequantizeLinear":
        before = index.producer_of(node.input[0])
        return str(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else None
    return None


def behind_quantisation(index: GraphIndex, tensor: str) -> str:
    """The last tensor behind Q/DQ pairs that every reader of `tensor` reads; `tensor` itself without pairs.

    An edit there is not rounded again with scales that were calibrated without it. Where readers differ, one reading
    `tensor` and another a pair behind it, or where the graph gives `tensor` out, no such tensor exists.
    """
    found = tensor
    while len(readers := index.consumers[tensor]) == 1:
        node = index.nodes[readers[0]]
        if node.op_type not in TRANSPARENT_OPS | QDQ_OPS or node.input[0] != tensor:
            break
        if any(value.name == tensor for value in index.graph.output):
            break
        tensor = node.output[0]
        if node.op_type == "DequantizeLinear":
            found = tensor
    return found


def in_float(index: GraphIndex, tensor: str) -> str:
    """The float tensor that `tensor` was quantised from, or `tensor` itself."""
    while (node := index.producer_of(tensor)) is not None and node.op_type in QUANTISING_OPS:
        tensor = node.input[0]
    return tensor


def before_scale(index: GraphIndex, tensor: str) -> str | None:
    """What `tensor` is a multiple of, where its producer multiplies by a constant; None elsewhere."""
    node = index.producer_of(tensor)
    if node is None or node.op_type != "Mul" or is_steering(node):
        return None
    computed = [name for name in node.input if index.is_computed(name)]
    return computed[0] if len(computed) == 1 else None


def behind_scale(index: GraphIndex, tensor: str) -> str | None:
    """The multiple of `tensor` by a constant, where that alone reads `tensor`; None elsewhere."""
    readers = index.consumers[tensor]
    if len(readers) != 1 or not (outputs := index.nodes[readers[0]].output):
        return None
    return outputs[0] if before_scale(index, outputs[0]) == tensor else None


def source_of(index: GraphIndex, tensor: str) -> str:
    """The tensor that `tensor` is, seen through casts, Q/DQ pairs and steering already in the graph."""
    while (node := index.producer_of(tensor)) is not None:
        before = node.input[0] if is_steering(node) else handed_on(index, node)
        if before is None:
            break
        tensor = before
    return tensor


def uncast(index: GraphIndex, tensor: str) -> str:
    """The tensor that `tensor` is, seen through casts and Q/DQ pairs."""
    while (node := index.producer_of(tensor)) is not None:
        if (before := handed_on(index, node)) is None:
            break
        tensor = before
    return tensor


def unquantised(index: GraphIndex, tensor: str) -> str:
    """What `tensor` was before its Q/DQ pair."""
    node = index.producer_of(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return tensor
    return handed_on(index, node) or tensor


def reshaped(index: GraphIndex, tensor: str) -> str:
    """The tensor of which `tensor` is another form."""
    while (node := index.producer_of(tensor)) is not None and node.op_type in FORM_OPS:
        tensor = node.input[0]
    return tensor
