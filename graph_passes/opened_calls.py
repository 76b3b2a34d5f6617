"""Open the calls of a file's functions that stand between an edit and the stream tensor it acts on.

A tensor that a function computes for itself has no name in the graph, and one that it gives out it may read
itself, past any edit behind the call. Such a call, and no other, is replaced by what the function computes; the
functions of the file stay, for its other calls. What each call was is kept beside the nodes that replace it.
"""

from __future__ import annotations

import base64
from bisect import bisect_left
from typing import TYPE_CHECKING

import onnx.inliner
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper

from calibration.errors import InputError, UnsupportedError
from graph_passes.fused_norms import is_fused, kept_node, sum_name
from graph_passes.graph_index import GraphIndex, describe, subgraphs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from graph_passes.scopes import Scope

CALL_KEY = "sarsteer.call"
"""Metadata entry of the first node of an opened call: the call, serialized, in base64."""
OPENED_KEY = "sarsteer.opened"
"""Metadata entry of every node of an opened call: the call's number in the graph, in the order of opening."""

MOST_DIGITS = 10
"""A number of more digits is none of ours, and Python may refuse to read it."""


def calls_in_the_way(model: ModelProto, scope: Scope, anchors: Collection[str]) -> list[int]:
    """Positions in the scope's graph of calls that hide a stream tensor, or read one that they also give out."""
    functions = _functions(model)
    graph = scope.graph(model)
    if not any(_function_id(node) in functions for node in graph.node):
        return []
    flat = list(scope.flat(model).graph.node)
    index = GraphIndex(scope.view(model).graph)
    ends = [max((index.producer[name] for name in node.output if name), default=-1) for node in flat]
    fused = {sum_name(node): at for at, node in enumerate(index.nodes) if is_fused(node)}
    found: set[int] = set()
    for anchor in anchors:
        produced = index.producer.get(anchor, fused.get(anchor))
        if produced is None:
            continue
        call = flat[bisect_left(ends, produced)]
        readers = [bisect_left(ends, at) for at in index.consumers[anchor]]
        reads_own = anchor in fused or any(flat[at] is call for at in readers if at < len(flat))
        if _function_id(call) in functions and (reads_own or anchor not in call.output):
            found.update(at for at, node in enumerate(graph.node) if node.output == call.output)
    return sorted(found)


def open_calls(model: ModelProto, scope: Scope, positions: Collection[int]) -> None:
    """Replace calls in the scope's graph, by position, by the nodes of their functions; one level of functions.

    Raises `UnsupportedError` for a function written for other opsets than the graph's.
    """
    graph, functions = scope.graph(model), _functions(model)
    taken = _names(model.graph)
    number = 1 + max((_opened(node) for node in graph.node), default=-1)
    nodes: list[NodeProto] = []
    for position, node in enumerate(graph.node):
        if position not in positions:
            nodes.append(node)
            continue
        nodes += _body(model, functions[_function_id(node)], node, number, taken)
        number += 1
    _write(graph, nodes)


def close_calls(graph: GraphProto) -> None:
    """Undo `open_calls`: the nodes of every opened call are the call again."""
    for number in sorted({_opened(node) for node in graph.node} - {-1}, reverse=True):
        nodes = []
        for node in graph.node:
            if _opened(node) != number:
                nodes.append(node)
            elif (call := _said(node).get(CALL_KEY)) is not None:
                nodes.append(kept_node(call))
        _write(graph, nodes)


def _body(
    model: ModelProto, function: FunctionProto, call: NodeProto, number: int, taken: set[str]
) -> list[NodeProto]:
    """What a call computes, as nodes under names of their own that say in their metadata whose they are."""
    _check_opsets(model, function)
    alone = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=[function])
    alone.graph.CopyFrom(
        helper.make_graph(
            [call],
            "call",
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(filter(None, call.input))],
            [onnx.ValueInfoProto(name=name) for name in call.output if name],
        )
    )
    try:
        nodes = list(onnx.inliner.inline_local_functions(alone).graph.node)
    except Exception as error:  # whatever is thrown in C++
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"{describe(call)} cannot be read: {reason}") from error
    if not nodes or any(_function_id(node) == _function_id(call) for node in nodes):
        raise UnsupportedError(f"{describe(call)} cannot be opened; inline the file's functions first")
    stem = _free_stem(call, taken)
    kept = {*call.input, *call.output, ""}
    for node in nodes:
        _prefix(node, f"{stem}/", kept)
        taken.update(node.output)
        _unsay(node)
        node.metadata_props.add(key=OPENED_KEY, value=str(number))
    original = base64.b64encode(call.SerializeToString(deterministic=True)).decode()
    nodes[0].metadata_props.add(key=CALL_KEY, value=original)
    return nodes


def _check_opsets(model: ModelProto, function: FunctionProto) -> None:
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    for entry in function.opset_import:
        version = versions.get(entry.domain or "ai.onnx")
        if version != entry.version:
            raise UnsupportedError(
                f"function {function.name!r} is written for opset {entry.version} of {entry.domain or 'ai.onnx'}; "
                f"expected the graph's, {version}, to edit inside it; inline the file's functions first "
                "(onnx.inliner.inline_local_functions with convert_version=True) and patch the result"
            )


def _prefix(node: NodeProto, prefix: str, kept: Collection[str]) -> None:
    """Put a prefix before the name of a node and of every tensor it reads or computes but those kept."""
    if node.name:
        node.name = prefix + node.name
    for names in (node.input, node.output):
        names[:] = [name if name in kept else prefix + name for name in names]
    for body in subgraphs(node):
        for child in body.node:
            _prefix(child, prefix, kept)
        for value in (*body.input, *body.output, *body.value_info):
            value.name = value.name if value.name in kept else prefix + value.name
        for tensor in body.initializer:
            tensor.name = tensor.name if tensor.name in kept else prefix + tensor.name


def _free_stem(call: NodeProto, taken: Collection[str]) -> str:
    first = stem = call.name or next(name for name in call.output if name)
    number = 0
    while any(name.startswith(f"{stem}/") for name in taken):
        number += 1
        stem = f"{first}.{number}"
    return stem


def _names(graph: GraphProto) -> set[str]:
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        names.update((node.name, *node.output))
        for body in subgraphs(node):
            names |= _names(body)
    return names


def _functions(model: ModelProto) -> Mapping[tuple[str, str, str], FunctionProto]:
    return {(function.domain, function.name, function.overload): function for function in model.functions}


def _function_id(node: NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


def _said(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _unsay(node: NodeProto) -> None:
    for position in reversed(range(len(node.metadata_props))):
        if node.metadata_props[position].key in (CALL_KEY, OPENED_KEY):
            del node.metadata_props[position]


def _opened(node: NodeProto) -> int:
    """The number of the opened call that a node is of, or −1."""
    said = _said(node).get(OPENED_KEY, "")
    return int(said) if said.isdecimal() and len(said) < MOST_DIGITS else -1


def _write(graph: GraphProto, nodes: list[NodeProto]) -> None:
    rewritten = GraphProto()
    rewritten.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(rewritten.node)
