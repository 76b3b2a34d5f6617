"""The sidecar of an engine: a JSON file that says what the engine is, was made from, and can be fed with.

An engine itself is opaque, bound to a library version and a GPU architecture, and cannot even be opened without a
GPU. Everything a person or a deployment must know before is here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from calibration.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "sarsteer-engine"
VERSION = 1
ENGINE_SUFFIX, SIDECAR_SUFFIX = ".engine", ".json"


@dataclass(frozen=True)
class Binding:
    """An input or output of an engine: dtype by its numpy name, dimensions as numbers or symbols."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.signature}"

    @property
    def signature(self) -> str:
        """Dtype and dimensions, for people."""
        return f"{self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class ShapeRange:
    """The shapes one input may have within a profile: smallest, the one tuned for, largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        return " .. ".join("x".join(map(str, shape)) for shape in (self.min, self.opt, self.max))


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the range of shapes of every dynamic input, by input name."""

    name: str
    shapes: dict[str, ShapeRange]


@dataclass(frozen=True)
class NetworkConstant:
    """A constant found in the parsed network: `consumer` is the layer that computes with it.

    `compared` says whether its values were compared bit for bit with the graph's; the bindings of TensorRT
    do not show bfloat16 values to Python, so that there only name, dtype and shape were.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    consumer: str
    consumer_layer: str
    compared: bool


@dataclass(frozen=True)
class Refit:
    """Whether the engine's steering can be swapped without a rebuild: the constants' names, or why not."""

    constants: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class BuildFacts:
    """How the engine was built: seconds, peak resident memory of the process in bytes, layers of the network.

    `start_rss_bytes`: what of that was there before, such as a model that was loaded.
    """

    seconds: float
    peak_rss_bytes: int
    start_rss_bytes: int
    layers: int
    platform: str


@dataclass(frozen=True)
class EngineRecord:
    """What a sidecar holds.

    `engine`: file, bytes and sha256 of the serialized engine. `graph`: file and sha256 of the ONNX graph, sha256 of
    each external data file, and the fingerprint of the model it was exported from, where it says.
    `compute_capabilities`: CUDA compute capabilities it was built for. `steering`: the steering constants found in
    the network, in the order in which they act. `warnings`: lines of the builder's log.
    """

    backend: str
    backend_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    profiles: tuple[Profile, ...]
    graph: dict[str, Any]
    engine: dict[str, Any]
    plan_sha256: str | None
    steering: tuple[NetworkConstant, ...]
    refit: Refit
    build: BuildFacts
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        """Write the sidecar."""
        path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> EngineRecord:
        """Read and check a sidecar. Raises `InputError` when it is missing, malformed or of another version."""
        try:
            content = json.loads(
                path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite
            )
        except OSError as error:
            raise InputError(f"{path}: the engine's sidecar cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: not the sidecar of an engine; expected format {FORMAT!r}")
        if content.get("version") != VERSION:
            raise InputError(
                f"{path}: version {content.get('version')!r}; this release reads version {VERSION}"
            )
        try:
            return cls._from_json(content)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: the sidecar is malformed: {error}") from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> EngineRecord:
        record: EngineRecord = _typed(cls, content, "sidecar")
        for key, kind in (("file", str), ("bytes", int), ("sha256", str)):
            _typed(kind, _entry(record.engine, key, "engine"), f"engine.{key}")
        return record


def sidecar_of(engine: Path) -> Path:
    """The sidecar's path beside an engine file."""
    return engine.with_suffix(SIDECAR_SUFFIX)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as `kind`, a type as the records here have. Raises `ValueError` when it is another."""
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(
            **{key: _typed(hint, _entry(value, key, where), f"{where}.{key}") for key, hint in hints.items()}
        )
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    plain = arguments if origin is UnionType else (kind,)
    if type(value) in plain:  # JSON's true is no number
        return value
    if float in plain and type(value) is int:
        return float(value)
    raise ValueError(f"{where} is {value!r:.60}; expected {getattr(kind, '__name__', kind)}")


def _entry(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"{where} has no {key!r}")
    return value[key]


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
