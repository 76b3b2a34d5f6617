"""`inspect`: what is in a plan, an ONNX file, an engine or a bundle, as JSON and as text."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError, SarsteerError, UnsupportedError
from calibration.plan import SteeringPlan
from engines.backends import find_backend
from engines.opening import open_decoder
from engines.sidecar import ENGINE_SUFFIX, EngineRecord, sidecar_of
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import external_files, read_graph
from graph_passes.patch import metadata
from graph_passes.residual_stream import find_residual_stream
from graph_passes.steering_in import steering_constants
from sarsteer_export.bundle.manifest import PLAN, Manifest, file_sha256
from sarsteer_export.range_guard import PROVENANCE_KEY, plan_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Inspection:
    """What was found: as JSON and as text."""

    content: dict[str, Any]
    text: str


def inspect(path: str | Path) -> Inspection:
    """Look into a plan (`.safetensors`), an ONNX file (`.onnx`), an engine (`.engine`) or a bundle (a folder)."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    if source.is_dir():
        return inspect_bundle(source)
    if source.suffix not in READERS:
        raise InputError(
            f"{source}: expected a plan (.safetensors), an ONNX file (.onnx), an engine (.engine) or a bundle folder"
        )
    return READERS[source.suffix](source)


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
    shown = dict(plan.provenance)
    if (found := plan_magnitudes(plan)) is not None:
        shown[PROVENANCE_KEY] = f"{max(found.unsteered):g} unsteered, {max(found.steered):g} steered"
    lines += [f"  {name}: {value}" for name, value in shown.items()]
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


def inspect_engine(path: Path) -> Inspection:
    """The sidecar of an engine, and the engine itself where it can be opened.

    Raises `InputError` when the engine is not the file that the sidecar describes.
    """
    record = EngineRecord.read(sidecar_of(path))
    if file_sha256(path) != record.engine["sha256"]:
        raise InputError(
            f"{path}: its sha256 is not the sidecar's; the engine was altered or belongs to another"
        )
    try:
        with open_decoder(path, find_backend(record.backend)) as runner:
            opened = f"opened here: {len(runner.inputs)} inputs, {len(runner.outputs)} outputs, as the sidecar says"
    except UnsupportedError as error:
        opened = f"not opened: {error}"
    lines = [
        f"engine of {record.graph.get('file', 'a graph')}, {record.engine['bytes'] / 1e6:.1f} MB",
        f"backend     {record.backend} {record.backend_version}, {record.precision}",
        f"built for   compute capability {', '.join(record.compute_capabilities)}",
        f"built in    {record.build.seconds:g} s, {record.build.layers} layers, peak memory "
        f"{record.build.peak_rss_bytes / 1e6:.0f} MB ({record.build.start_rss_bytes / 1e6:.0f} MB before it), "
        f"on {record.build.platform}",
        f"plan        {record.plan_sha256 or 'none: the graph was not steered'}",
        f"refit       {record.refit.reason or f'{len(record.refit.constants)} constants'}",
        opened,
        *_alike("input   ", {item.name: item.signature for item in record.inputs}),
        *_alike("output  ", {item.name: item.signature for item in record.outputs}),
    ]
    for profile in record.profiles:
        lines.append(f"profile {profile.name}")
        lines += _alike("  ", {name: str(shapes) for name, shapes in profile.shapes.items()})
    lines.append(f"steering: {len(record.steering)} constants" if record.steering else "steering: none")
    lines += [
        f"  {constant.name}  {constant.dtype} {list(constant.shape)} -> {constant.consumer} {constant.consumer_layer}"
        for constant in record.steering
    ]
    lines += [f"builder: {line}" for line in record.warnings]
    return Inspection({"kind": "engine", **record.to_json(), "opened": opened}, "\n".join(lines))


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
    lines += [f"engine: {entry.label}, {entry.verdict}" for entry in manifest.engines]
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


def _alike(prefix: str, entries: dict[str, str]) -> list[str]:
    """A line per run of entries that say the same: a decoder has dozens of cache inputs."""
    lines = []
    for text, run in itertools.groupby(entries, key=lambda name: entries[name]):
        names = list(run)
        shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{prefix}{shown}: {text}")
    return lines


READERS: dict[str, Callable[[Path], Inspection]] = {
    ".safetensors": inspect_plan,
    ".onnx": inspect_graph,
    ENGINE_SUFFIX: inspect_engine,
}
"""What reads a file, by its suffix."""
