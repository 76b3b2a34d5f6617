"""The steering plan: the one contract between PyTorch and ONNX.

A plan is an ordered list of edits to the residual stream, plus provenance, in one safetensors file. This
module needs numpy and safetensors only, so that graph passes and production readers can load a plan
without PyTorch. `docs/plan.md` defines the file format and the meaning of every operation.

Dimensions: B batch, S sequence, D width of the residual stream, K rank of a basis, L decoder blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calibration.edits import OPERATIONS, Add, Edit, Project, Site, check_strength, edit_header
from calibration.errors import InputError
from calibration.positions import PositionKind, Positions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT = "sarsteer-plan"
VERSION = 1
METADATA_KEY = "sarsteer"

__all__ = [
    "OPERATIONS",
    "Add",
    "Edit",
    "PositionKind",
    "Positions",
    "Project",
    "Site",
    "SteeringPlan",
    "check_plan_fits",
]


@dataclass(frozen=True)
class SteeringPlan:
    """An ordered list of edits for a decoder of `num_layers` blocks and width `hidden_size`.

    `provenance` is free JSON: what the plan was computed from. Its `model_fingerprint`, when present, ties
    the plan to one checkpoint. Raises `InputError` naming the field that is wrong.
    """

    hidden_size: int
    num_layers: int
    edits: tuple[Edit, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        _check_count("hidden_size", self.hidden_size)
        _check_count("num_layers", self.num_layers)
        if not self.edits:
            raise InputError("the plan has no edits; expected at least one")
        for index, edit in enumerate(self.edits):
            self._validate_edit(f"edits.{index}", edit)
        _check_provenance(self.provenance)

    def _validate_edit(self, where: str, edit: Edit) -> None:
        if isinstance(edit.layer, bool) or not isinstance(edit.layer, int):
            raise InputError(f"{where}.layer is {edit.layer!r}; expected an integer")
        if not 0 <= edit.layer < self.num_layers:
            raise InputError(
                f"{where}.layer is {edit.layer}; expected 0 to {self.num_layers - 1} "
                f"(the plan is for {self.num_layers} decoder blocks, counted from 0)"
            )
        if edit.site is Site.FINAL_NORM_OUTPUT and edit.layer != self.num_layers - 1:
            raise InputError(
                f"{where}.layer is {edit.layer}; an edit at final_norm_output names the last block, "
                f"{self.num_layers - 1}"
            )
        for name, kind in (("site", Site), ("positions", Positions)):
            if not isinstance(getattr(edit, name), kind):
                raise InputError(f"{where}.{name} is {getattr(edit, name)!r}; expected a {kind.__name__}")
        check_strength(f"{where}.strength", edit.strength)
        edit.validate(where, self.hidden_size)

    @property
    def model_fingerprint(self) -> str | None:
        """Fingerprint of the checkpoint the plan was calibrated on, or None for a hand-written plan."""
        value = self.provenance.get("model_fingerprint")
        return value if isinstance(value, str) else None

    def digest(self) -> str:
        """Content hash (hex sha256) of what the plan does: sizes, edits and tensors, not provenance."""
        bare = dataclasses.replace(self, provenance={})
        return hashlib.sha256(bare.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The plan as the bytes of its safetensors file; equal plans give equal bytes."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "edits": [edit_header(edit) for edit in self.edits],
            "provenance": dict(self.provenance),
        }
        tensors = {
            f"edits.{index}.{name}": np.ascontiguousarray(tensor)
            for index, edit in enumerate(self.edits)
            for name, tensor in edit.tensors().items()
        }
        return save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True, allow_nan=False)})

    def save(self, path: str | Path) -> None:
        """Write the plan to `path` (safetensors), whole or not at all."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_bytes(self.to_bytes())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> SteeringPlan:
        """Read and validate a plan file.

        Raises `InputError` that names the file and the field that is wrong.
        """
        source = Path(path)
        if not source.is_file():
            raise InputError(f"plan {source}: no such file")
        try:
            with safe_open(source, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
            # safetensors raises TypeError or AttributeError for dtypes that numpy lacks (bfloat16, float8)
            raise InputError(f"plan {source}: not a readable safetensors file ({error})") from error
        try:
            return _decode(metadata, tensors)
        except InputError as error:
            raise InputError(f"plan {source}: {error}") from None
        except RecursionError:
            raise InputError(
                f"plan {source}: metadata entry {METADATA_KEY!r} is not JSON of a sane depth"
            ) from None


def check_plan_fits(
    plan: SteeringPlan,
    *,
    hidden_size: int,
    num_layers: int,
    fingerprint: str | None = None,
    force: bool = False,
) -> None:
    """Raise `InputError` when `plan` was made for another shape of model or, unless `force`, another model.

    `fingerprint` is that of the model or graph at hand; None when it is not known.
    """
    if plan.hidden_size != hidden_size:
        raise InputError(f"the plan is for width {plan.hidden_size}; this decoder's width is {hidden_size}")
    if plan.num_layers != num_layers:
        raise InputError(
            f"the plan is for {plan.num_layers} decoder blocks; this decoder has {num_layers} blocks"
        )
    made_for = plan.model_fingerprint
    if not force and made_for is not None and fingerprint is not None and made_for != fingerprint:
        raise InputError(
            f"the plan was made for another model: its fingerprint is {made_for[:12]}, this model's is "
            f"{fingerprint[:12]}; calibrate on this model, or use --force to steer it all the same"
        )


def _decode(metadata: Mapping[str, str], tensors: dict[str, NDArray[Any]]) -> SteeringPlan:
    if METADATA_KEY not in metadata:
        raise InputError(f"no metadata entry {METADATA_KEY!r}; this safetensors file is not a steering plan")
    try:
        header = json.loads(metadata[METADATA_KEY])
    except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python reads
        raise InputError(f"metadata entry {METADATA_KEY!r} is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"metadata entry {METADATA_KEY!r} is no JSON object")
    if header.get("format") != FORMAT:
        raise InputError(f"format is {header.get('format')!r}; expected {FORMAT!r}")
    if type(header.get("version")) is not int or header["version"] != VERSION:
        raise InputError(f"version is {header.get('version')!r}; this release reads version {VERSION}")
    known = {"format", "version", "hidden_size", "num_layers", "edits", "provenance"}
    if unknown := sorted(set(header) - known):
        raise InputError(f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    entries = header.get("edits")
    if not isinstance(entries, list):
        raise InputError(f"edits is {type(entries).__name__}; expected a list")
    remaining = dict(tensors)
    edits = tuple(_decode_edit(f"edits.{index}", entry, remaining) for index, entry in enumerate(entries))
    if remaining:
        raise InputError(f"tensors that belong to no edit: {', '.join(sorted(remaining))}")
    provenance = header.get("provenance", {})
    if not isinstance(provenance, dict):
        raise InputError(f"provenance is {type(provenance).__name__}; expected an object")
    return SteeringPlan(
        hidden_size=_integer("hidden_size", header.get("hidden_size")),
        num_layers=_integer("num_layers", header.get("num_layers")),
        edits=edits,
        provenance=provenance,
    )


def _decode_edit(where: str, entry: object, remaining: dict[str, NDArray[Any]]) -> Edit:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {type(entry).__name__}; expected an object")
    known = {"layer", "site", "op", "positions", "strength"}
    if unknown := sorted(set(entry) - known):
        raise InputError(
            f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if missing := sorted(known - set(entry)):
        raise InputError(f"{where} lacks {', '.join(missing)}")
    operations = {operation.op: operation for operation in OPERATIONS}
    operation = operations.get(entry["op"]) if isinstance(entry["op"], str) else None
    if operation is None:
        raise InputError(f"{where}.op is {entry['op']!r}; known are {', '.join(operations)}")
    check_strength(f"{where}.strength", entry["strength"])

    def take(name: str, *, required: bool) -> NDArray[np.float32] | None:
        tensor = remaining.pop(f"{where}.{name}", None)
        if tensor is None and required:
            raise InputError(f"tensor {where}.{name} is missing")
        if tensor is not None and tensor.dtype != np.float32:
            raise InputError(f"tensor {where}.{name} is {tensor.dtype}; expected float32")
        return tensor

    placement: dict[str, Any] = {
        "layer": _integer(f"{where}.layer", entry["layer"]),
        "strength": float(entry["strength"]),
        "site": _member(f"{where}.site", Site, entry["site"]),
        "positions": Positions.parse(entry["positions"], f"{where}.positions"),
    }
    if operation is Add:
        return Add(vector=take("vector", required=True), **placement)  # type: ignore[arg-type]
    return Project(basis=take("basis", required=True), mean=take("mean", required=False), **placement)  # type: ignore[arg-type]


def _check_count(where: str, value: object) -> None:
    if _integer(where, value) < 1:
        raise InputError(f"{where} is {value}; expected at least 1")


def _check_provenance(provenance: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(provenance), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance is not JSON ({error})") from None


def _integer(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where} is {value!r}; expected an integer")
    return value


def _member(where: str, kind: type[Any], value: object) -> Any:
    members: list[str] = [member.value for member in kind]
    if value not in members:
        raise InputError(f"{where} is {value!r}; known are {', '.join(members)}")
    return kind(value)
