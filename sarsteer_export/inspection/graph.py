"""What is in an ONNX file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from calibration.errors import SarsteerError
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import external_files, read_graph
from graph_passes.patch import metadata
from graph_passes.residual_stream import find_residual_stream
from graph_passes.steering_in import steering_constants
from sarsteer_export.inspection.found import Inspection

if TYPE_CHECKING:
    from pathlib import Path


def inspect_graph(path: Path) -> Inspection:
    """Interface, residual stream and steering of an ONNX file."""
    model = read_graph(path)
    constants = steering_constants(model)
    content: dict[str, Any] = {
        "kind": "onnx",
        "inputs": [dataclasses.asdict(port) for port in graph_inputs(model)],
        "outputs": [dataclasses.asdict(port) for port in graph_outputs(model)],
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "external_data": [file.location for file in external_files(model)],
        "metadata": metadata(model),
        "steering": [dataclasses.asdict(constant) for constant in constants],
    }
    lines = [f"input   {port}" for port in graph_inputs(model)]
    lines += [f"output  {port}" for port in graph_outputs(model)]
    lines += [f"{key}: {value}" for key, value in metadata(model).items()]
    try:
        stream = find_residual_stream(model)
    except SarsteerError as error:
        content["stream"] = None
        lines.append(f"no residual stream: {error}")
    else:
        content["stream"] = dataclasses.asdict(stream)
        lines.append(f"residual stream: {len(stream.blocks)} blocks of width {stream.hidden_size}")
        lines += [f"  block {block.index:3}  {block.input} -> {block.output}" for block in stream.blocks]
        lines.append(f"  final norm  {stream.final_norm_output}")
    lines.append(f"steering: {len(constants)} constants" if constants else "steering: none")
    lines += [
        f"  {constant.name}  {constant.elem_type} {list(constant.shape)}  norm {constant.norm:.4g}"
        for constant in constants
    ]
    return Inspection(content, "\n".join(lines))
