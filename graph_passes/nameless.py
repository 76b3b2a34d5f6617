"""A graph without metadata and without names that steering gives, to be read by structure alone."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto

from graph_passes.expressions import COMMUTATIVE_OPS
from graph_passes.fused_norms import SUM_OUTPUT, is_fused, split_fused_norms, sum_name
from graph_passes.graph_index import subgraphs
from graph_passes.names import STEERING_PREFIX

FREE_PREFIX = "free."
"""Stands before names that begin as those of steering do, so that nothing is read from them."""


def nameless(model: ModelProto) -> ModelProto:
    """A copy of a flat graph without metadata, whose names say nothing of steering; fused norms are split in it.

    What is computed twice is read where it is computed first.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    _rename(copy.graph)
    _name_sums(copy.graph)
    copy = split_fused_norms(copy)
    _read_first_of_equals(copy.graph)
    return copy


def shown(text: str) -> str:
    """Names in a text as the file has them."""
    return text.replace(FREE_PREFIX + STEERING_PREFIX, STEERING_PREFIX)


def _rename(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = _free(value.name)
    for tensor in graph.initializer:
        tensor.name = _free(tensor.name)
    for node in graph.node:
        node.name = _free(node.name)
        del node.metadata_props[:]
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name.startswith(STEERING_PREFIX):
                    names[position] = _free(name)
        for body in subgraphs(node):
            _rename(body)


def _name_sums(graph: GraphProto) -> None:
    """Give every sum that a fused norm keeps to itself a name that nothing else has, as its fourth output."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    for node in graph.node:
        if not is_fused(node) or sum_name(node) in node.output:
            continue
        name, number = sum_name(node), 0
        while name in taken:
            number += 1
            name = f"{sum_name(node)}.{number}"
        taken.add(name)
        node.output.extend([""] * (SUM_OUTPUT - len(node.output)))
        del node.output[SUM_OUTPUT:]
        node.output.append(name)


def _read_first_of_equals(graph: GraphProto) -> None:
    """Where several nodes compute the same from the same, make readers read the first: a sum made twice is one sum."""
    first: dict[tuple[object, ...], NodeProto] = {}
    same: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = same.get(name, name)
        if subgraphs(node) or not node.input:
            continue
        operands = sorted(node.input) if node.op_type in COMMUTATIVE_OPS else list(node.input)
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        key = (node.domain, node.op_type, *operands, *attributes)
        other = first.setdefault(key, node)
        if other is not node and len(other.output) == len(node.output):
            same |= {
                name: kept for name, kept in zip(node.output, other.output, strict=True) if name and kept
            }


def _free(name: str) -> str:
    return FREE_PREFIX + name if name.startswith(STEERING_PREFIX) else name
