"""The plan file: what is written, what is read back, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from calibration.errors import InputError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan, check_plan_fits
from tests.conftest import random_basis, random_vector

DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"
IN_ONE_FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""Every example writes the same file anew, so that one temporary folder serves them all."""

# ---------------------------------------------------------------------------------------------- round trip

finite = st.floats(-1e6, 1e6, width=32)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edits_of(draw: st.DrawFn, hidden_size: int, num_layers: int) -> Edit:
    site = draw(st.sampled_from(Site))
    layer = num_layers - 1 if site is Site.FINAL_NORM_OUTPUT else draw(st.integers(0, num_layers - 1))
    placement: dict[str, Any] = {
        "strength": draw(st.floats(-1e4, 1e4)),
        "site": site,
        "positions": draw(
            st.sampled_from(
                [Positions.LAST, Positions.ALL, Positions.PROMPT, Positions.first(3), Positions.range(2)]
            )
        ),
    }
    vectors = st.lists(finite, min_size=hidden_size, max_size=hidden_size).map(np.float32)
    if draw(st.booleans()):
        return Add(layer, draw(vectors), **placement)
    rank, seed = draw(st.integers(1, hidden_size)), draw(st.integers(0, 2**31))
    return Project(layer, random_basis(hidden_size, rank, seed=seed), draw(st.none() | vectors), **placement)


@st.composite
def plans(draw: st.DrawFn) -> SteeringPlan:
    hidden_size, num_layers = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    edits = draw(st.lists(edits_of(hidden_size, num_layers), min_size=1, max_size=4))
    provenance = draw(st.dictionaries(st.text(), json_values, max_size=3))
    return SteeringPlan(hidden_size, num_layers, tuple(edits), provenance)


@IN_ONE_FOLDER
@given(plans())
def test_a_plan_comes_back_from_its_file_as_it_was(tmp_path: Path, plan: SteeringPlan) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = SteeringPlan.load(path)
    assert path.read_bytes() == plan.to_bytes() == loaded.to_bytes()
    assert (loaded.hidden_size, loaded.num_layers) == (plan.hidden_size, plan.num_layers)
    assert loaded.provenance == plan.provenance
    for got, expected in zip(loaded.edits, plan.edits, strict=True):
        for name in ("op", "layer", "site", "positions", "strength"):
            assert getattr(got, name) == getattr(expected, name)
        assert got.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            assert got.tensors()[name].dtype == np.float32
            np.testing.assert_array_equal(got.tensors()[name], tensor)
    assert loaded == plan


@given(plans())
@settings(max_examples=30, deadline=None)
def test_equal_plans_give_equal_bytes_and_the_digest_ignores_provenance(plan: SteeringPlan) -> None:
    again = SteeringPlan(
        plan.hidden_size, plan.num_layers, plan.edits, dict(reversed(list(plan.provenance.items())))
    )
    assert again.to_bytes() == plan.to_bytes()
    assert dataclasses.replace(plan, provenance={"other": 1}).digest() == plan.digest()


def small_plan(**changes: Any) -> SteeringPlan:
    add = Add(1, np.array([1, -2, 0.5, 3], dtype=np.float32), strength=0.25)
    basis = np.array([[1, 0], [0, 0], [0, 1], [0, 0]], dtype=np.float32)
    project = Project(
        2, basis, np.float32([1, 2, 3, 4]), site=Site.FINAL_NORM_OUTPUT, positions=Positions.ALL
    )
    fields: dict[str, Any] = {
        "hidden_size": 4,
        "num_layers": 3,
        "edits": (add, project),
        "provenance": {"model": "tiny", "model_fingerprint": "ab" * 32},
    }
    return SteeringPlan(**fields | changes)


def test_the_file_is_byte_for_byte_the_documented_format() -> None:
    header = (
        '{"edits": [{"layer": 1, "op": "add", "positions": "last", "site": "block_output", "strength": 0.25}, '
        '{"layer": 2, "op": "project", "positions": "all", "site": "final_norm_output", "strength": 1.0}], '
        '"format": "sarsteer-plan", "hidden_size": 4, "num_layers": 3, '
        '"provenance": {"model": "tiny", "model_fingerprint": "' + "ab" * 32 + '"}, "version": 1}'
    )
    tensors = {
        "edits.0.vector": np.float32([1, -2, 0.5, 3]),
        "edits.1.basis": np.float32([[1, 0], [0, 0], [0, 1], [0, 0]]),
        "edits.1.mean": np.float32([1, 2, 3, 4]),
    }
    table: dict[str, Any] = {"__metadata__": {"sarsteer": header}}
    end = 0
    for name, tensor in tensors.items():
        table[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    assert small_plan().to_bytes() == len(text).to_bytes(8, "little") + text + data


def test_the_digest_of_a_plan_never_changes() -> None:
    """Steered graphs name their plan by this digest: a new value orphans every graph shipped so far."""
    assert small_plan().digest() == "d9ec7f2d5af8378cba67f6d501ce330e08f5806afab6e65eb9aae53bbbfab958"


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: dataclasses.replace(plan.edits[0], strength=0.5),
        lambda plan: dataclasses.replace(plan.edits[0], layer=0),
        lambda plan: dataclasses.replace(plan.edits[0], positions=Positions.ALL),
        lambda plan: dataclasses.replace(plan.edits[0], site=Site.BLOCK_INPUT),
        lambda plan: dataclasses.replace(plan.edits[0], vector=-plan.edits[0].vector),
    ],
    ids=["strength", "layer", "positions", "site", "vector"],
)
def test_the_digest_and_equality_see_every_part_of_an_edit(change: Callable[[Any], Edit]) -> None:
    plan = small_plan()
    changed = small_plan(edits=(change(plan), plan.edits[1]))
    assert changed.digest() != plan.digest()
    assert changed != plan
    assert small_plan() == plan


def test_the_order_of_edits_is_part_of_the_plan() -> None:
    plan = small_plan()
    turned = small_plan(edits=plan.edits[::-1])
    assert turned.digest() != plan.digest()
    assert turned != plan


def test_the_ten_line_example_of_the_document_writes_a_plan_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    example_code = next(block for block in blocks if "save_file" in block)
    assert len([line for line in example_code.splitlines() if line.strip()]) <= 12
    assert "calibration" not in example_code
    monkeypatch.chdir(tmp_path)
    exec(compile(example_code, str(DOCUMENT), "exec"), {})  # noqa: S102 - the document's own example
    plan = SteeringPlan.load(tmp_path / "plan.safetensors")
    assert [type(edit) for edit in plan.edits] == [Add]
    assert plan.edits[0].site is Site.BLOCK_OUTPUT
    assert plan.edits[0].positions is Positions.LAST


# ------------------------------------------------------------------------------------------ what is refused

Files = tuple[dict[str, Any], dict[str, np.ndarray]]


def valid_files() -> Files:
    header = {
        "format": "sarsteer-plan",
        "version": 1,
        "hidden_size": 4,
        "num_layers": 3,
        "edits": [
            {"layer": 1, "site": "block_output", "op": "add", "positions": "last", "strength": 0.5},
            {"layer": 2, "site": "block_input", "op": "project", "positions": "all", "strength": 1},
        ],
        "provenance": {},
    }
    tensors = {
        "edits.0.vector": np.float32([1, 2, 3, 4]),
        "edits.1.basis": random_basis(4, 2, seed=0),
        "edits.1.mean": np.float32([1, 0, 0, 0]),
    }
    return header, tensors


def write(path: Path, header: Any, tensors: dict[str, np.ndarray], *, text: str | None = None) -> Path:
    save_file(tensors, path, {"sarsteer": json.dumps(header) if text is None else text})
    return path


def test_the_files_that_the_refusals_below_start_from_are_valid(tmp_path: Path) -> None:
    assert len(SteeringPlan.load(write(tmp_path / "plan.safetensors", *valid_files())).edits) == 2


BAD_HEADERS: list[tuple[str, list[str | int], Any, str]] = [
    ("foreign format", ["format"], "other", "format is 'other'"),
    ("unknown version", ["version"], 2, "version is 2"),
    ("boolean version", ["version"], True, "version is True"),
    ("float version", ["version"], 1.0, "version is 1.0"),
    ("unknown field", ["extra"], 1, "unknown fields extra"),
    ("zero width", ["hidden_size"], 0, "hidden_size is 0"),
    ("text width", ["hidden_size"], "4", "hidden_size is '4'"),
    ("boolean layers", ["num_layers"], True, "num_layers is True"),
    ("other width", ["hidden_size"], 5, "edits.0.vector has shape (4,); expected (5,)"),
    ("edits no list", ["edits"], {}, "edits is dict"),
    ("no edits", ["edits"], [], "tensors that belong to no edit"),
    ("edit no object", ["edits", 0], 3, "edits.0 is int"),
    ("unknown edit field", ["edits", 0, "gate"], "x", "edits.0 has unknown fields gate"),
    ("layer out of range", ["edits", 0, "layer"], 3, "edits.0.layer is 3; expected 0 to 2"),
    ("negative layer", ["edits", 0, "layer"], -1, "edits.0.layer is -1; expected 0 to 2"),
    ("float layer", ["edits", 0, "layer"], 1.0, "edits.0.layer is 1.0"),
    ("boolean layer", ["edits", 0, "layer"], True, "edits.0.layer is True"),
    ("unknown op", ["edits", 0, "op"], "rotate", "edits.0.op is 'rotate'"),
    ("op no text", ["edits", 0, "op"], ["add"], "edits.0.op is ['add']"),
    ("unknown site", ["edits", 0, "site"], "mlp", "edits.0.site is 'mlp'"),
    ("site no text", ["edits", 0, "site"], {}, "edits.0.site is {}"),
    ("unknown positions", ["edits", 0, "positions"], "first", "edits.0.positions is 'first'"),
    ("final norm of an early block", ["edits", 0, "site"], "final_norm_output", "edits.0.layer is 1"),
    ("text strength", ["edits", 0, "strength"], "1", "edits.0.strength is '1'"),
    ("boolean strength", ["edits", 0, "strength"], True, "edits.0.strength is True"),
    ("null strength", ["edits", 0, "strength"], None, "edits.0.strength is None"),
    ("NaN strength", ["edits", 0, "strength"], float("nan"), "edits.0.strength is nan"),
    ("infinite strength", ["edits", 0, "strength"], float("inf"), "edits.0.strength is inf"),
    ("huge strength", ["edits", 0, "strength"], 1e31, "edits.0.strength is 1e+31"),
    ("huge integer strength", ["edits", 0, "strength"], 10**400, "edits.0.strength is 1000"),
    ("provenance no object", ["provenance"], [], "provenance is list"),
    ("NaN in provenance", ["provenance", "alpha"], float("nan"), "provenance is not JSON"),
]


@pytest.mark.parametrize(
    ("keys", "value", "message"), [case[1:] for case in BAD_HEADERS], ids=[case[0] for case in BAD_HEADERS]
)
def test_a_wrong_header_is_refused_with_its_field(
    tmp_path: Path, keys: list[str | int], value: Any, message: str
) -> None:
    header, tensors = valid_files()
    target: Any = header
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    refused(write(tmp_path / "plan.safetensors", header, tensors), message)


@pytest.mark.parametrize("name", ["layer", "site", "op", "positions", "strength"])
def test_a_missing_edit_field_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    header, tensors = valid_files()
    del header["edits"][1][name]
    refused(write(tmp_path / "plan.safetensors", header, tensors), f"edits.1 lacks {name}")


@pytest.mark.parametrize("name", ["format", "version", "hidden_size", "num_layers", "edits"])
def test_a_missing_header_field_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    header, tensors = valid_files()
    del header[name]
    refused(write(tmp_path / "plan.safetensors", header, tensors), name)


def test_provenance_may_be_left_out(tmp_path: Path) -> None:
    header, tensors = valid_files()
    del header["provenance"]
    assert SteeringPlan.load(write(tmp_path / "plan.safetensors", header, tensors)).provenance == {}


def skewed(basis: np.ndarray) -> np.ndarray:
    return np.float32(basis + np.float32([[0, 0.01]]))


BAD_TENSORS: list[tuple[str, str, Callable[[np.ndarray], np.ndarray | None], str]] = [
    ("NaN", "edits.0.vector", lambda v: np.float32([1, np.nan, np.nan, 0]), "edits.0.vector has 2 values"),
    ("infinite", "edits.1.mean", lambda v: np.float32([np.inf, 0, 0, 0]), "edits.1.mean has 1 values"),
    ("NaN basis", "edits.1.basis", lambda v: np.full_like(v, np.nan), "edits.1.basis has 8 values"),
    ("wrong width", "edits.0.vector", lambda v: v[:3], "edits.0.vector has shape (3,); expected (4,)"),
    ("wrong rank", "edits.0.vector", lambda v: v[None], "edits.0.vector has shape (1, 4)"),
    ("wrong mean", "edits.1.mean", lambda v: v[:3], "edits.1.mean has shape (3,)"),
    ("flat basis", "edits.1.basis", lambda v: v[:, 0].copy(), "edits.1.basis has shape (4,)"),
    ("transposed basis", "edits.1.basis", lambda v: v.T.copy(), "edits.1.basis has shape (2, 4)"),
    ("basis too wide", "edits.1.basis", lambda v: np.eye(4, 5, dtype="f4"), "edits.1.basis has shape (4, 5)"),
    ("empty basis", "edits.1.basis", lambda v: v[:, :0].copy(), "edits.1.basis has shape (4, 0)"),
    ("float64", "edits.0.vector", lambda v: v.astype(np.float64), "edits.0.vector is float64"),
    ("float16", "edits.0.vector", lambda v: v.astype(np.float16), "edits.0.vector is float16"),
    ("integers", "edits.0.vector", lambda v: v.astype(np.int32), "edits.0.vector is int32"),
    ("missing", "edits.0.vector", lambda v: None, "tensor edits.0.vector is missing"),
    ("missing basis", "edits.1.basis", lambda v: None, "tensor edits.1.basis is missing"),
    ("skewed basis", "edits.1.basis", skewed, "edits.1.basis is not orthonormal"),
    ("doubled basis", "edits.1.basis", lambda v: 2 * v, "edits.1.basis is not orthonormal"),
    (
        "basis rounded to bfloat16",
        "edits.1.basis",
        lambda v: v.astype(ml_dtypes.bfloat16).astype(np.float32),
        "edits.1.basis is not orthonormal",
    ),
    (
        "basis whose products overflow",
        "edits.1.basis",
        lambda v: np.float32([[1e30, 1e30], [1e30, -1e30], [0, 0], [0, 0]]),
        "edits.1.basis is not orthonormal",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS]
)
def test_a_wrong_tensor_is_refused_with_its_name(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None], message: str
) -> None:
    header, tensors = valid_files()
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    refused(write(tmp_path / "plan.safetensors", header, tensors), message)


def test_a_float32_svd_basis_is_orthonormal_enough() -> None:
    left, _, _ = np.linalg.svd(np.random.default_rng(0).standard_normal((256, 40)).astype(np.float32))
    SteeringPlan(256, 1, (Project(0, left[:, :20]),))


def test_a_strength_whose_product_overflows_is_refused() -> None:
    with pytest.raises(InputError, match=r"edits\.0: strength 1e\+30 times the vector overflows float32"):
        SteeringPlan(2, 1, (Add(0, np.float32([1, 1e9]), strength=1e30),))


def test_leftover_tensors_are_refused(tmp_path: Path) -> None:
    header, tensors = valid_files()
    tensors["edits.0.mean"] = np.zeros(4, dtype=np.float32)
    refused(
        write(tmp_path / "plan.safetensors", header, tensors), "tensors that belong to no edit: edits.0.mean"
    )


def test_empty_edits_are_refused(tmp_path: Path) -> None:
    header, _ = valid_files()
    header["edits"] = []
    refused(write(tmp_path / "plan.safetensors", header, {}), "no edits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ('{"version": ' + "1" * 5000 + "}", "is not JSON"),
        ('{"edits": ' + "[" * 200_000, "not JSON"),
        ('{"format": ' + "[" * 900 + "]" * 900 + "}", "format"),
    ],
    ids=["empty", "cut", "list", "null", "5000 digits", "deep and open", "deep"],
)
def test_metadata_that_is_no_sane_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    refused(write(tmp_path / "plan.safetensors", None, valid_files()[1], text=text), message)


@pytest.mark.parametrize("depth", range(930, 1000, 3))
def test_no_depth_of_nesting_escapes(tmp_path: Path, depth: int) -> None:
    """Near the interpreter's recursion limit either the parser or a message's repr gives up first."""
    header, tensors = valid_files()
    header["edits"][0]["site"] = "@"
    text = json.dumps(header).replace('"@"', "[" * depth + "]" * depth)
    refused(write(tmp_path / "plan.safetensors", None, tensors, text=text), "")


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, dtype=np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "model.safetensors", "no metadata entry 'sarsteer'")


def test_a_tensor_of_a_dtype_numpy_lacks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.safetensors", *valid_files())
    metadata = {"sarsteer": json.dumps(valid_files()[0])}
    for dtype, width in (("F8_E4M3", 1), ("BF16", 2)):
        entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * width]}
        header = json.dumps({"__metadata__": metadata, "edits.0.vector": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * width))
        refused(path, "float")  # "bfloat16 … expected float32" where ml_dtypes taught numpy bfloat16


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.safetensors", *valid_files())
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "not a readable safetensors file")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "no such file")


@IN_ONE_FOLDER
@given(st.binary(max_size=200))
@example(b"\xff" * 16)
@example(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.safetensors"
    path.write_bytes(content)
    refused(path, "")


@st.composite
def mutated_headers(draw: st.DrawFn) -> Any:
    """A valid header in which some values, at any depth, were replaced, removed or added."""
    header: Any = valid_files()[0]
    strange = json_values | st.sampled_from(
        [float("nan"), float("inf"), -1, 0, 2**70, 10**400, 1e308, "last", "add", "project", True]
    )
    for _ in range(draw(st.integers(1, 3))):
        target = header
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(target[key], (dict, list)) and draw(st.integers(0, 3)):
                target = target[key]
                continue
            match draw(st.sampled_from(["replace", "remove", "add"])):
                case "replace":
                    target[key] = draw(strange)
                case "remove":
                    del target[key]
                case "add" if isinstance(target, dict):
                    target[draw(st.text())] = draw(strange)
                case _:
                    target.append(draw(strange))
            break
    return header


@settings(IN_ONE_FOLDER, max_examples=300)
@given(mutated_headers())
def test_only_input_errors_escape_from_a_mutated_header(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "plan.safetensors", header, valid_files()[1])
    try:
        plan = SteeringPlan.load(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - loading may also succeed
    else:
        assert SteeringPlan.load(path).to_bytes() == plan.to_bytes()


@settings(IN_ONE_FOLDER, max_examples=150)
@given(st.integers(0), st.integers(0, 255))
def test_only_input_errors_escape_from_a_flipped_byte(tmp_path: Path, place: int, value: int) -> None:
    path = write(tmp_path / "plan.safetensors", *valid_files())
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        SteeringPlan.load(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - loading may also succeed


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        SteeringPlan.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Add(0, np.float32([1, 2]), strength=float("nan")), "edits.0.strength is nan"),
        (Add(0, np.float32([1, 2]), strength="1"), "edits.0.strength is '1'"),  # type: ignore[arg-type]
        (Add(0, np.float32([1, 2]), strength=True), "edits.0.strength is True"),
        (Add(0, np.float32([1, 2]), site="block_output"), "edits.0.site is 'block_output'"),  # type: ignore[arg-type]
        (Add(0, np.float32([1, 2]), positions="last"), "edits.0.positions is 'last'"),  # type: ignore[arg-type]
        (Add("0", np.float32([1, 2])), "edits.0.layer is '0'"),  # type: ignore[arg-type]
    ],
    ids=["NaN", "text", "boolean", "site", "positions", "layer"],
)
def test_a_plan_built_in_memory_is_held_to_the_same_rules(edit: Edit, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        SteeringPlan(2, 1, (edit,))


def test_provenance_must_be_json() -> None:
    with pytest.raises(InputError, match="provenance is not JSON"):
        small_plan(provenance={"when": object()})


def test_tensors_are_read_only_copies() -> None:
    mine = random_vector(4, seed=0)
    add = Add(0, mine)
    mine[0] = 100
    assert add.vector[0] != 100
    project = Project(0, random_basis(4, 2, seed=0), np.zeros(4, dtype=np.float32))
    for tensor in (add.vector, project.basis, project.mean):
        assert tensor is not None
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 1


def test_tensors_of_a_loaded_plan_are_read_only(tmp_path: Path) -> None:
    small_plan().save(tmp_path / "plan.safetensors")
    for edit in SteeringPlan.load(tmp_path / "plan.safetensors").edits:
        for tensor in edit.tensors().values():
            with pytest.raises(ValueError, match="read-only"):
                tensor[0] = 1


def test_saving_leaves_no_partial_file_behind(tmp_path: Path) -> None:
    small_plan().save(tmp_path / "plan.safetensors")
    small_plan().save(tmp_path / "plan.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


# ------------------------------------------------------------------------------------------------------ fits


def test_a_plan_fits_the_model_it_was_made_for() -> None:
    check_plan_fits(small_plan(), hidden_size=4, num_layers=3, fingerprint="ab" * 32)
    check_plan_fits(small_plan(), hidden_size=4, num_layers=3, fingerprint=None)
    check_plan_fits(small_plan(provenance={}), hidden_size=4, num_layers=3, fingerprint="cd" * 32)


def test_a_plan_for_another_shape_is_refused_even_when_forced() -> None:
    with pytest.raises(InputError, match="width 4; this decoder's width is 5"):
        check_plan_fits(small_plan(), hidden_size=5, num_layers=3, fingerprint=None, force=True)
    with pytest.raises(InputError, match="3 decoder blocks; this decoder has 4 blocks"):
        check_plan_fits(small_plan(), hidden_size=4, num_layers=4, fingerprint=None, force=True)


def test_a_plan_for_another_checkpoint_is_refused_unless_forced() -> None:
    with pytest.raises(InputError, match="fingerprint is abababababab, this model's is cdcdcdcdcdcd"):
        check_plan_fits(small_plan(), hidden_size=4, num_layers=3, fingerprint="cd" * 32)
    check_plan_fits(small_plan(), hidden_size=4, num_layers=3, fingerprint="cd" * 32, force=True)


# --------------------------------------------------------------------------------------------------- imports


def test_plans_load_without_torch(tmp_path: Path) -> None:
    small_plan().save(tmp_path / "plan.safetensors")
    code = (
        "import sys; from calibration.plan import SteeringPlan; import calibration.errors; "
        "SteeringPlan.load(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'onnx', 'soundfile'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plan.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
