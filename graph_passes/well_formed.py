"""What every reader of a graph takes for granted: names are text, and nodes have the operands their operators need.

ONNX's own checker is not asked: it also refuses much that runtimes and exporters agree on.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import onnx
from onnx import FunctionProto, GraphProto

from calibration.errors import InputError
from graph_passes.graph_index import describe, subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

OPERANDS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(
        ("Cast", "Identity", "Reshape", "Softmax", "QuantizeLinear", "DynamicQuantizeLinear"), (1, 1)
    ),
    **dict.fromkeys(("DequantizeLinear", "Slice", "Squeeze", "Unsqueeze", "LayerNormalization"), (1, 1)),
    **dict.fromkeys(
        ("SimplifiedLayerNormalization", "RMSNormalization", "Gather", "GatherND", "Conv"), (2, 1)
    ),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "MatMulNBits", "FusedMatMul", "Gemm"), (2, 1)
    ),
    **dict.fromkeys(("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"), (3, 1)),
}
"""Inputs and outputs at least, of operators that structure is read from, in whatever domain."""


def check_well_formed(model: ModelProto) -> None:
    """Raise `InputError` for a node that lacks operands, or a name that is not UTF-8, anywhere in the file."""
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    own = {(function.domain, function.name) for function in model.functions}
    _check_texts("the file", (entry.domain for entry in model.opset_import))
    _check_texts(
        "its metadata", (text for entry in model.metadata_props for text in (entry.key, entry.value))
    )
    _check_initializers(model.graph)
    parts: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
    for part in parts:
        _check_part(part, versions.get("ai.onnx", 0), own)


def _check_initializers(graph: GraphProto) -> None:
    """Every initializer has a name of its own; a sparse one has that of no other anywhere, bodies included."""
    dense: Counter[str] = Counter()
    sparse: Counter[str] = Counter()
    for scope in _with_bodies(graph):
        own = Counter(tensor.name for tensor in scope.initializer)
        if twice := next((name for name, count in own.items() if count > 1), None):
            raise InputError(f"the initializer {twice!r} is defined twice; expected each name once")
        dense |= own
        sparse.update(str(tensor.values.name) for tensor in scope.sparse_initializer)
    for name, count in sparse.items():
        if count > 1 or name in dense:
            raise InputError(
                f"the initializer {name!r} is defined twice, once sparse; expected each name once"
            )


def _with_bodies(graph: GraphProto) -> Iterator[GraphProto]:
    waiting = [graph]
    while waiting:
        scope = waiting.pop()
        waiting.extend(body for node in scope.node for body in subgraphs(node))
        yield scope


def _check_part(part: GraphProto | FunctionProto, opset: int, own: set[tuple[str, str]]) -> None:
    _check_texts("its tensors", _names(part))
    for node in part.node:
        _check_texts(
            "a node",
            (node.op_type, node.domain, node.name, node.overload, *node.input, *node.output),
            (text for entry in node.metadata_props for text in (entry.key, entry.value)),
            (attribute.name for attribute in node.attribute),
        )
        if (node.domain, node.op_type) not in own:
            _check_operands(node, opset)
        for body in subgraphs(node):
            _check_part(body, opset, own)


def _check_operands(node: NodeProto, opset: int) -> None:
    inputs, outputs = OPERANDS.get(node.op_type, (0, 0))
    if node.domain in ("", "ai.onnx"):
        more = _required(node.op_type, opset)
        inputs, outputs = max(inputs, more[0]), max(outputs, more[1])
    for what, held, wanted in (("input", node.input, inputs), ("output", node.output, outputs)):
        if len(held) < wanted:
            raise InputError(
                f"{describe(node)} has {len(held)} {what}s; expected at least {wanted}; the file is damaged"
            )


@cache
def _required(op_type: str, opset: int) -> tuple[int, int]:
    """Inputs and outputs that ONNX requires of one of its own operators; none of one that it does not know."""
    try:
        schema = onnx.defs.get_schema(op_type, min(opset, onnx.defs.onnx_opset_version()), "")
    except (onnx.defs.SchemaError, TypeError):  # no such operator in this opset, or an opset that is no int32
        return 0, 0
    return schema.min_input, schema.min_output


def _names(part: GraphProto | FunctionProto) -> Iterator[str]:
    if isinstance(part, FunctionProto):
        yield from (part.name, part.domain, *part.input, *part.output)
        yield from (entry.domain for entry in part.opset_import)
    else:
        values: Iterable[ValueInfoProto] = (*part.input, *part.output)
        for value in values:
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for tensor in part.initializer:
            yield from _tensor_texts(tensor)
        for sparse in part.sparse_initializer:
            yield from (*_tensor_texts(sparse.values), *_tensor_texts(sparse.indices))
    for value in part.value_info:
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _tensor_texts(tensor: TensorProto) -> Iterator[str]:
    yield tensor.name
    for entry in tensor.external_data:
        yield from (entry.key, entry.value)


def _check_texts(where: str, *texts: Iterable[str | bytes]) -> None:
    """protobuf gives a string that is not UTF-8 as bytes."""
    for several in texts:
        for text in several:
            if isinstance(text, bytes):
                shown = text[:40].decode(errors="backslashreplace")
                raise InputError(f"{where} holds the name {shown!r}, which is not UTF-8; the file is damaged")
