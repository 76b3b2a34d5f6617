"""Sidecars: what is written is read again; what is not a sidecar is refused, and the wrong entry named."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import InputError
from engines.sidecar import (
    Binding,
    BuildFacts,
    EngineRecord,
    NetworkConstant,
    Profile,
    Refit,
    ShapeRange,
    sidecar_of,
)

RECORD = EngineRecord(
    backend="tensorrt-rtx",
    backend_version="1.2.3",
    compute_capabilities=("8.6", "8.9"),
    precision="bfloat16",
    inputs=(Binding("inputs_embeds", "bfloat16", ("batch", "sequence", 64)), Binding("scalar", "int64", ())),
    outputs=(Binding("logits", "float32", ("batch", "sequence", 300)),),
    profiles=(Profile("prefill", {"inputs_embeds": ShapeRange((1, 1, 64), (1, 256, 64), (4, 1024, 64))}),),
    graph={"file": "decoder.onnx", "sha256": "a" * 64, "external_data": {}, "model_fingerprint": None},
    engine={"file": "decoder.engine", "bytes": 12, "sha256": "b" * 64},
    plan_sha256="c" * 64,
    steering=(NetworkConstant("sarsteer.0.x", "bfloat16", (64,), "ELEMENTWISE SUM", "add", False),),
    refit=Refit(("sarsteer.0.x",), None),
    build=BuildFacts(1.5, 3_000_000_000, 1_000_000_000, 88, "Linux x86_64"),
    warnings=("a line of the builder's log",),
)
names = st.text(max_size=8)
counts = st.integers(0, 2**53)
shapes = st.lists(counts, max_size=3).map(tuple)
bindings = st.lists(
    st.builds(Binding, names, names, st.lists(names | counts, max_size=3).map(tuple)), max_size=2
).map(tuple)
records = st.builds(
    EngineRecord,
    backend=names,
    backend_version=names,
    compute_capabilities=st.lists(names, max_size=2).map(tuple),
    precision=names,
    inputs=bindings,
    outputs=bindings,
    profiles=st.lists(
        st.builds(
            Profile, names, st.dictionaries(names, st.builds(ShapeRange, shapes, shapes, shapes), max_size=2)
        ),
        max_size=2,
    ).map(tuple),
    graph=st.fixed_dictionaries({"file": names, "sha256": names}),
    engine=st.fixed_dictionaries({"file": names, "bytes": counts, "sha256": names}),
    plan_sha256=st.none() | names,
    steering=st.lists(
        st.builds(NetworkConstant, names, names, shapes, names, names, st.booleans()), max_size=2
    ).map(tuple),
    refit=st.builds(Refit, st.lists(names, max_size=2).map(tuple), st.none() | names),
    build=st.builds(BuildFacts, st.floats(0, 1e9), counts, counts, counts, names),
    warnings=st.lists(names, max_size=2).map(tuple),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sidecar") / "decoder.json"


@given(record=records)
def test_what_is_written_is_read_again(record: EngineRecord, file: Path) -> None:
    record.write(file)
    assert EngineRecord.read(file) == record


def test_it_is_strict_json_with_format_and_version_first(file: Path) -> None:
    RECORD.write(file)
    text = file.read_text(encoding="utf-8")
    assert list(json.loads(text))[:2] == ["format", "version"]
    assert json.loads(text)["inputs"][0] == {
        "name": "inputs_embeds",
        "dtype": "bfloat16",
        "dims": ["batch", "sequence", 64],
    }
    slow = dataclasses.replace(RECORD, build=dataclasses.replace(RECORD.build, seconds=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        slow.write(file)
    assert file.read_text(encoding="utf-8") == text


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where every entry of a JSON value stands, the value itself first."""
    yield above
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from places(entry, (*above, key))


CONTENT = json.loads(json.dumps(RECORD.to_json()))
FREE = {("graph", "file"), ("graph", "sha256"), ("graph", "external_data"), ("graph", "model_fingerprint")}
"""What a graph is known by differs with where it came from; readers take it or leave it."""
ENTRIES = [
    place
    for place in places(CONTENT)
    if place and place not in FREE and place[0] not in ("format", "version")
]


def at(content: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


def shown(place: tuple[str | int, ...]) -> str:
    """The place as messages name it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")


@pytest.mark.parametrize("place", ENTRIES, ids=shown)
def test_an_entry_of_another_type_is_refused_and_named(place: tuple[str | int, ...], file: Path) -> None:
    """null, a truth value, numbers, text, a list and an object in the place of each entry that is none of them."""
    held = at(CONTENT, place)
    admitted: tuple[type, ...] = (type(held),)
    if place[-2:-1] == ("dims",):
        admitted = (int, str)
    elif place == ("build", "seconds"):
        admitted = (float, int)
    elif place in [("plan_sha256",), ("refit", "reason")]:
        admitted = (str, type(None))
    for wrong in (None, True, 7, 7.5, "seven", [[]], {"seven": []}):
        if type(wrong) in admitted and (not isinstance(wrong, (list, dict)) or place == ("graph",)):
            continue
        content = copy.deepcopy(CONTENT)
        at(content, place[:-1])[place[-1]] = wrong
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            EngineRecord.read(file)
        assert str(caught.value).startswith(f"{file}: the sidecar is malformed: ")
        assert shown(place) in str(caught.value), (wrong, str(caught.value))


@pytest.mark.parametrize(
    "place",
    [place for place in ENTRIES if isinstance(place[-1], str) and place[-2:-1] != ("shapes",)],
    ids=shown,
)
def test_an_entry_that_is_missing_is_refused_and_named(place: tuple[str | int, ...], file: Path) -> None:
    content = copy.deepcopy(CONTENT)
    del at(content, place[:-1])[place[-1]]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=rf"the sidecar is malformed: .* has no '{place[-1]}'"):
        EngineRecord.read(file)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ('{"format": "sarsteer-engine", "version": 1', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not the sidecar of an engine; expected format 'sarsteer-engine'"),
        ("null", "not the sidecar of an engine"),
        ('{"format": "sarsteer-bundle", "version": 1}', "not the sidecar of an engine"),
        ('{"format": "sarsteer-engine", "version": 2}', "version 2; this release reads version 1"),
        ('{"format": "sarsteer-engine"}', "version None; this release reads version 1"),
        ('{"format": "sarsteer-engine", "version": 1}', "malformed: sidecar has no 'backend'"),
        (json.dumps(CONTENT).replace("1.5", "NaN"), "NaN is no finite number"),
        (json.dumps(CONTENT).replace("1.5", "-Infinity"), "-Infinity is no finite number"),
        (json.dumps(CONTENT).replace("1.5", "1e999"), "1e999 is no finite number"),
        (json.dumps(CONTENT).replace("1.5", "9" * 400), "malformed"),
    ],
)
def test_another_file_is_refused(text: str, why: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=why) as caught:
        EngineRecord.read(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_file_that_cannot_be_read_is_refused(file: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="the engine's sidecar cannot be read"):
            EngineRecord.read(missing)
    file.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(InputError, match="not JSON"):
        EngineRecord.read(file)


def test_it_lies_beside_its_engine() -> None:
    assert sidecar_of(Path("engines/a-1.2/decoder.engine")) == Path("engines/a-1.2/decoder.json")


def test_bindings_and_ranges_read_as_people_write_them() -> None:
    assert str(RECORD.inputs[0]) == "inputs_embeds: bfloat16 [batch, sequence, 64]"
    assert str(RECORD.profiles[0].shapes["inputs_embeds"]) == "1x1x64 .. 1x256x64 .. 4x1024x64"
