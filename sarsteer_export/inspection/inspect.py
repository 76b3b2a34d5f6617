"""Look into whatever a path names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from engines.sidecar import ENGINE_SUFFIX
from sarsteer_export.inspection.bundle import inspect_bundle
from sarsteer_export.inspection.engine import inspect_engine
from sarsteer_export.inspection.graph import inspect_graph
from sarsteer_export.inspection.statistics import inspect_safetensors
from sarsteer_export.inspection.vectors import inspect_vectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from sarsteer_export.inspection.found import Inspection


def inspect(path: str | Path) -> Inspection:
    """Look into a plan or statistics (`.safetensors`), an ONNX file, an engine, a bundle folder, or vectors."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    if source.is_dir():
        return inspect_bundle(source)
    if source.suffix not in READERS:
        raise InputError(
            f"{source}: expected a plan or statistics (.safetensors), an ONNX file (.onnx), an engine (.engine), "
            "a bundle folder, or vectors of another tool (.gguf, .svec, .pt, .pth)"
        )
    return READERS[source.suffix](source)


READERS: dict[str, Callable[[Path], Inspection]] = {
    ".safetensors": inspect_safetensors,
    ".onnx": inspect_graph,
    ENGINE_SUFFIX: inspect_engine,
    **dict.fromkeys((".gguf", ".svec", ".pt", ".pth"), inspect_vectors),
}
"""What reads a file, by its suffix."""
