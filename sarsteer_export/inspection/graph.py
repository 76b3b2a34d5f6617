"""What is in an ONNX file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from calibration.errors import SarsteerError
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import external_files, read_graph
from graph_passes.plan_names import metadata
from graph_passes.residual_stream import find_residual_streams
from graph_passes.steering_in import steering_constants
from graph_passes.stream_table import stream_table
from sarsteer_export.inspection.found import Inspection, alike
from sarsteer_export.inspection.stream_text import table_lines

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto


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
    lines = alike("input   ", {port.name: port.signature for port in graph_inputs(model)})
    lines += alike("output  ", {port.name: port.signature for port in graph_outputs(model)})
    lines += [f"{key}: {value}" for key, value in metadata(model).items()]
    try:
        bodies, tables = _streams(model)
    except SarsteerError as error:
        content["stream"] = None
        lines.append(f"no residual stream: {error}")
    else:
        content |= next(iter(bodies.values()))
        content["bodies"] = {name: body for name, body in bodies.items() if name}
        lines += tables
    lines.append(f"steering: {len(constants)} constants" if constants else "steering: none")
    if content["stream"] is None:  # otherwise the table has them where they act
        lines += [
            f"  {constant.name}  {constant.elem_type} {list(constant.shape)}  norm {constant.norm:.4g}"
            for constant in constants
        ]
    return Inspection(content, "\n".join(lines))


def _streams(model: ModelProto) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What is known of the stream in each body of a decoder, one unnamed in a flat graph, and the tables as text."""
    bodies, lines = {}, []
    for scope, stream in find_residual_streams(model).items():
        table = stream_table(scope.view(model), stream)
        bodies[str(scope)] = {
            "stream": dataclasses.asdict(stream),
            "sites": [dataclasses.asdict(row) for row in table.rows],
            "shared": [dataclasses.asdict(node) for node in table.shared],
        }
        lines += table_lines(table, str(scope))
    return bodies, lines
