"""Steering plans as files, fitting a graph, and damage to them: to tensors, to the header, to the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import load, save

from calibration.plan import FORMAT, METADATA_KEY, VERSION, SteeringPlan
from sarsteer_export.range_guard import PROVENANCE_KEY
from tests.conftest import random_basis, random_vector
from tests.fuzz.mutations import TEXTS, picked

Header: TypeAlias = dict[str, Any]
Tensors: TypeAlias = dict[str, np.ndarray]
Mutate: TypeAlias = Callable[[Header, Tensors, int, int], None]

POSITIONS = (
    "last",
    "all",
    "last",
    "all",
    "range:0:",
    "prompt",
    "generated",
    "first:2",
    "range:1:3",
    "range:2:",
)
SITES = ("block_output", "block_input", "final_norm_output")
LAYERS: tuple[Any, ...] = (-1, 3, 99, 10**9, 2**63, 10**400, 1.5, "1", None, True, [])
WORDS: tuple[Any, ...] = ("", "scale", "Add", "ADD", "last\n", None, 5, [], {}, "²", "a" * 5000)
SPANS = (
    "first:0",
    "first:999999999",
    "first:²",
    "range:5:2",
    "range::",
    "range:0:999999999",
    "range:-1:2",
    "middle",
)
STRENGTHS: tuple[Any, ...] = (
    0,
    -0.0,
    1e30,
    -1e30,
    1e31,
    1e-45,
    10**400,
    float("nan"),
    float("inf"),
    None,
    "1",
    True,
)
COUNTS: tuple[Any, ...] = (0, -1, 1, 7, 15, 2**40, 2**63, 10**400, 1.0, "16", None, True, [])


def whole_plan(width: int, layers: int, number: int, count: int) -> tuple[Header, Tensors]:
    """Header and tensors of a plan of `count` edits that fits; `number` picks what they are."""
    edits, tensors = [], {}
    for index in range(count):
        pick = number // 7**index
        op, site, layer = picked(("add", "project"), pick), picked(SITES, pick // 2), (pick + index) % layers
        edit = {"layer": layer, "site": site, "op": op, "positions": picked(POSITIONS, pick), "strength": 1.0}
        if site == "final_norm_output":
            edit["layer"] = layers - 1
        edits.append(edit)
        if op == "add":
            tensors[f"edits.{index}.vector"] = random_vector(width, seed=index)
        else:
            tensors[f"edits.{index}.basis"] = random_basis(width, 2, seed=index)
            tensors[f"edits.{index}.mean"] = random_vector(width, seed=index)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "hidden_size": width,
        "num_layers": layers,
        "edits": edits,
    }
    return header | {"provenance": {}}, tensors


def as_file(plan: SteeringPlan) -> tuple[Header, Tensors]:
    """Header and tensors of a plan."""
    raw = plan.to_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: Header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][METADATA_KEY])
    return header, dict(load(raw))


def plan_file(header: Header, tensors: Tensors) -> bytes:
    """The bytes of a plan file, whatever its header says."""
    return save(tensors, {METADATA_KEY: header.get("raw") or json.dumps(header)})


def tensor_type(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    name = picked(sorted(tensors), pick)
    tensors[name] = np.zeros_like(
        tensors[name], picked(("float16", "float64", "int8", "bool", "uint64", ">f4"), other)
    )


def tensor_shape(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    name = picked(sorted(tensors), pick)
    tensor = tensors[name]
    shapes = (tensor[:-1], tensor[None], tensor[:0], tensor.reshape(-1), tensor.T, np.float32(1).reshape(()))
    tensors[name] = np.ascontiguousarray(picked(shapes, other))


def tensor_values(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    name = picked(sorted(tensors), pick)
    value = picked((np.nan, np.inf, -np.inf, 3e38, 1e20, 0.0, 1e-45), other)
    values = tensors[name].astype(np.float32)
    values.flat[: None if other % 3 else 1] = value
    tensors[name] = values


def tensor_missing(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    del tensors[picked(sorted(tensors), pick)]


def tensor_extra(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    names = ("edits.0.basis", "edits.9.vector", "edits.0.mean", "", "edits.0", "a\nb", "edits.²0.vector")
    tensors[picked(names, pick)] = np.zeros(picked((0, 1, 16), other), np.float32)


def edit_field(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    edits = header["edits"]
    if not isinstance(edits, list) or not edits or not isinstance(edits[pick % len(edits)], dict):
        return
    edit = edits[pick % len(edits)]
    fields: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("layer", LAYERS),
        ("site", WORDS),
        ("op", WORDS),
        ("positions", (*SPANS, *WORDS)),
        ("strength", STRENGTHS),
        ("extra", WORDS),
    )
    name, values = picked(fields, other)
    edit[name] = picked(values, other // len(fields))


def edit_missing_field(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    edits = header["edits"]
    if isinstance(edits, list) and edits and isinstance(edits[0], dict) and edits[0]:
        del edits[0][picked(sorted(edits[0]), pick)]


def repeated_edit(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    """One more edit, of the same place, with tensors or without."""
    edits = header["edits"]
    if isinstance(edits, list) and edits:
        edits.append(edits[0])
        if other % 2:
            for name in [name for name in tensors if name.startswith("edits.0.")]:
                tensors[f"edits.{len(edits) - 1}.{name.rpartition('.')[2]}"] = tensors[name]


def header_field(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    fields: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("hidden_size", COUNTS),
        ("num_layers", COUNTS),
        ("version", (0, 2, "1", None, True, 1.0)),
        ("format", WORDS),
        ("edits", ([], {}, None, [1], [[]], "edits")),
        (
            "provenance",
            (None, [], {"model_fingerprint": "f" * 64}, {"model_fingerprint": 5}, {PROVENANCE_KEY: [1]}),
        ),
        ("unknown", WORDS),
    )
    name, values = picked(fields, pick)
    header[name] = picked(values, other)


def other_model(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    header["provenance"] = {"model_fingerprint": picked(("f" * 64, "", "garbage"), pick)}


def magnitudes(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    """What calibration says it saw, which the check of float16 reads."""
    value: Any = picked((1e9, -1.0, "x", None, [], 10**400, {}), other)
    whole = {"unsteered": [value] * 3, "steered": [value] * 3}
    header["provenance"] = {PROVENANCE_KEY: picked((value, [value], whole, {"steered": value}), pick)}


def not_json(header: Header, tensors: Tensors, pick: int, other: int) -> None:
    deep = "[" * 100_000
    header["raw"] = picked((*TEXTS[1:], deep, "null", "[]", "NaN", '{"edits": ' + deep), pick)


MUTATIONS: dict[str, Mutate] = {
    mutate.__name__: mutate
    for mutate in (
        tensor_type, tensor_shape, tensor_values, tensor_missing, tensor_extra, edit_field, edit_missing_field,
        repeated_edit, header_field, other_model, magnitudes, not_json,
    )
}  # fmt: skip
"""Every mutation of a plan by its name."""
