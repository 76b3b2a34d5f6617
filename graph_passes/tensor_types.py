"""Element types and widths of stream tensors: from the file or, where it does not say, by shape inference."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx

from calibration.errors import InputError, SiteNotFoundError
from graph_passes.tensor_sizes import type_name

if TYPE_CHECKING:
    from onnx import ModelProto, TypeProto


def elem_type_and_width(model: ModelProto, start: str, outputs: list[str]) -> tuple[int, int]:
    """Element type and width of the stream, from the file or, where it does not say, by shape inference."""
    tensors = [*outputs, start]
    types = recorded_types(model, tensors)
    if len(_widths(types)) != 1 or not any(name in types for name in outputs):
        types = recorded_types(_inferred(model), tensors)
    widths = _widths(types)
    if len(widths) != 1:
        raise SiteNotFoundError(
            f"the width of the residual stream at {outputs[0]!r} is not one fixed number; found "
            f"{sorted(widths) or 'none'}"
        )
    elem_types = {types[name].tensor_type.elem_type for name in outputs if name in types}
    if len(elem_types) != 1:
        raise SiteNotFoundError(
            f"the residual stream at {outputs[0]!r} is not of one element type; found "
            f"{sorted(map(type_name, elem_types)) or 'none'}"
        )
    return elem_types.pop(), widths.pop()


def _inferred(model: ModelProto) -> ModelProto:
    """`model` with the types that shape inference finds, which knows ONNX's own operators by no domain alone."""
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in model.graph.node}
    if "ai.onnx" in domains:
        view = onnx.ModelProto()
        view.CopyFrom(model)
        for opset in view.opset_import:
            opset.domain = "" if opset.domain == "ai.onnx" else opset.domain
        for node in view.graph.node:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
        model = view
    try:
        return onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        return model  # operators it does not know; what is missing then is said by the caller
    except Exception as error:  # whatever is thrown in C++: it meets damaged graphs unprepared
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"the graph does not say how wide its stream is, and shape inference fails: {reason}"
        ) from error


def _widths(types: dict[str, TypeProto]) -> set[int]:
    """The fixed last dimensions (B, S, D); exporters write them as numbers or as numeric strings."""
    dims = [value.tensor_type.shape.dim for value in types.values()]
    last = [dim[2] for dim in dims if len(dim) == 3]
    return {dim.dim_value or fixed(dim.dim_param) or 0 for dim in last} - {0}


def fixed(symbol: str) -> int | None:
    """The number that a symbolic dimension is in truth, as some exporters write it; None for a symbol."""
    return int(symbol) if re.fullmatch(r"[0-9]{1,18}", symbol) else None


def recorded_types(model: ModelProto, tensors: list[str]) -> dict[str, TypeProto]:
    """The types that the file records for some tensors; those it says nothing of are left out."""
    graph, wanted = model.graph, set(tensors)
    return {
        value.name: value.type
        for value in (*graph.value_info, *graph.output, *graph.input)
        if value.name in wanted and value.type.tensor_type.elem_type
    }
