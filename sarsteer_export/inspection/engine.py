"""What is in an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.errors import InputError, UnsupportedError
from engines.backends import find_backend
from engines.opening import open_decoder
from engines.sidecar import EngineRecord, sidecar_of
from sarsteer_export.bundle.manifest import file_sha256
from sarsteer_export.inspection.found import Inspection, alike

if TYPE_CHECKING:
    from pathlib import Path


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
        *alike("input   ", {item.name: item.signature for item in record.inputs}),
        *alike("output  ", {item.name: item.signature for item in record.outputs}),
    ]
    for profile in record.profiles:
        lines.append(f"profile {profile.name}")
        lines += alike("  ", {name: str(shapes) for name, shapes in profile.shapes.items()})
    lines.append(f"steering: {len(record.steering)} constants" if record.steering else "steering: none")
    lines += [
        f"  {constant.name}  {constant.dtype} {list(constant.shape)} -> {constant.consumer} {constant.consumer_layer}"
        for constant in record.steering
    ]
    lines += [f"builder: {line}" for line in record.warnings]
    return Inspection({"kind": "engine", **record.to_json(), "opened": opened}, "\n".join(lines))
