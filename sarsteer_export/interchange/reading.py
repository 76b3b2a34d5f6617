"""Read a file of any known format, told by its content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.errors import InputError, SarsteerError
from calibration.plan import SteeringPlan
from sarsteer_export.bundle.manifest import file_sha256
from sarsteer_export.interchange.activations import activation_states
from sarsteer_export.interchange.control_vector import read_control_vector
from sarsteer_export.interchange.gguf import MAGIC
from sarsteer_export.interchange.steering_vectors import CLASS, steering_vector
from sarsteer_export.interchange.svec import read_svec
from sarsteer_export.interchange.torch_files import PICKLE, ZIP, load_without_running

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TypeAlias

    from calibration.states import CalibrationStates
    from sarsteer_export.interchange.vectors import LayerVectors

    Content: TypeAlias = "SteeringPlan | LayerVectors | CalibrationStates"

KNOWN = (
    "a plan (safetensors), a llama.cpp control vector (GGUF), an .svec file, or torch.save of a SteeringVector or of "
    "SARSteer activations"
)
PEEK_BYTES = 16
MOST_BYTES = 1 << 30
"""A GGUF or JSON file of vectors is far smaller; more is another file, and is not read whole."""


@dataclass(frozen=True)
class Source:
    """What a file holds, and its hash."""

    path: Path
    sha256: str
    content: Content


def read_source(path: Path) -> Source:
    """Read `path`. Raises `InputError` that names the file, for one of no known format too."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = _read(path)
    except SarsteerError as error:
        named = str(error).startswith(f"plan {path}: ")
        raise (error if named else type(error)(f"{path}: {error}")) from None
    return Source(path, file_sha256(path), content)


def _read(path: Path) -> Content:
    with path.open("rb") as opened:
        start = opened.read(PEEK_BYTES)
    if start.startswith((ZIP, PICKLE)):
        loaded = load_without_running(path, (CLASS,))
        found = steering_vector(loaded) or activation_states(loaded)
        if found is None:
            raise InputError(
                "it is a file of torch.save, but neither a SteeringVector, a dict from layer to tensor, nor a "
                "checkpoint of SARSteer activations"
            )
        return found
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_bytes <= path.stat().st_size:  # as a safetensors file begins
        return SteeringPlan.load(path)
    if not start.startswith(MAGIC) and not start.lstrip().startswith(b"{"):
        raise InputError(f"it is of no known format; expected {KNOWN}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise InputError(f"it has {size} bytes; expected a file of vectors, at most {MOST_BYTES}")
    content = path.read_bytes()
    return read_control_vector(content) if start.startswith(MAGIC) else read_svec(content, path.name)
