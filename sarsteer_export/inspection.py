"""`inspect`: what is in a plan, an ONNX file or a bundle, as JSON and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError, SarsteerError
from calibration.plan import SteeringPlan
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import external_files, read_graph
from graph_passes.patch import metadata
from graph_passes.residual_stream import find_residual_stream
from graph_passes.steering_in import steering_constants
from sarsteer_export.bundle.manifest import PLAN, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Inspection:
    """What was found: as JSON and as text."""

    content: dict[str, Any]
    text: str


def inspect(path: str | Path) -> Inspection:
    """Look into a plan (`.safetensors`), an ONNX file (`.onnx`) or a bundle (a folder)."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    reader: Callable[[Path], Inspection] = inspect_graph
    if source.is_dir():
        reader = inspect_bundle
    elif source.suffix not in (".onnx", ".safetensors"):
        raise InputError(f"{source}: expected a plan (.safetensors), an ONNX file (.onnx) or a bundle folder")
    elif source.suffix == ".safetensors":
        reader = inspect_plan
    return reader(source)


def inspect_plan(path: Path) -> Inspection:
    """Edits and provenance of a plan."""
    plan = SteeringPlan.load(path)
    edits: list[dict[str, Any]] = [
        {
            "layer": edit.layer,
            "site": edit.site.value,
            "op": edit.op,
            "positions": edit.positions.value,
            "strength": edit.strength,
            "tensors": {
                name: {"shape": list(tensor.shape), "norm": float(np.linalg.norm(tensor))}
                for name, tensor in edit.tensors().items()
            },
        }
        for edit in plan.edits
    ]
    lines = [f"plan for {plan.num_layers} blocks of width {plan.hidden_size}, sha256 {plan.digest()[:12]}"]
    for edit in edits:
        tensors = ", ".join(f"|{name}| {entry['norm']:.4g}" for name, entry in edit["tensors"].items())
        lines.append(
            f"  block {edit['layer']:3}  {edit['site']:18} {edit['op']:8} {edit['positions']:5} "
            f"strength {edit['strength']:g}  {tensors}"
        )
    lines += [f"  {name}: {value}" for name, value in plan.provenance.items()]
    content = {
        "kind": "plan",
        "hidden_size": plan.hidden_size,
        "num_layers": plan.num_layers,
        "sha256": plan.digest(),
        "edits": edits,
        "provenance": dict(plan.provenance),
    }
    return Inspection(content, "\n".join(lines))


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


def inspect_bundle(folder: Path) -> Inspection:
    """Manifest, plan and parity of a bundle."""
    manifest = Manifest.read(folder)
    plan = inspect_plan(folder / PLAN)
    content = {"kind": "bundle", "manifest": dataclasses.asdict(manifest), "plan": plan.content}
    lines = [
        f"bundle of {manifest.model['class']} ({manifest.model['dtype']}), "
        f"fingerprint {manifest.model['fingerprint'][:12]}",
        f"parity: {manifest.parity['verdict']} on {manifest.parity['backend']}, {manifest.parity['precision']}",
    ]
    for name, graph in manifest.graphs.items():
        lines.append(name)
        for direction in ("inputs", "outputs"):
            lines += [
                f"  {direction[:-1]:7} {port['name']}: {port['elem_type'].lower()} "
                f"[{', '.join(map(str, port['dims']))}]"
                for port in graph[direction]
            ]
    lines += [f"{name}  {entry['bytes']:,} bytes" for name, entry in manifest.files.items()]
    return Inspection(content, "\n".join([*lines, plan.text]))
