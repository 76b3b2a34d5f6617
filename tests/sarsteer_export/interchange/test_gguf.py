"""GGUF files, ours beside those of the package `gguf`, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calibration.errors import InputError
from sarsteer_export.interchange.gguf import gguf_bytes, read_gguf
from tests.sarsteer_export.interchange.written import FILES

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20),
    arrays(np.float32, st.integers(1, 40), elements=FLOATS),
    min_size=1,
    max_size=5,
)
METADATA: dict[str, str | int] = {
    "general.architecture": "controlvector",
    "a.text": "größe",
    "a.number": 2**32 - 1,
}
REPENG = (FILES / "repeng.gguf").read_bytes()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@given(TENSORS)
def test_what_is_written_is_read(tensors: dict[str, np.ndarray]) -> None:
    found = read_gguf(gguf_bytes(METADATA, tensors))
    assert found.metadata == METADATA
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor, strict=True)


def test_the_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"direction.{layer}": rng.standard_normal(7).astype(np.float32) for layer in (1, 5)}
    tensors["matrix"] = rng.standard_normal((2, 3)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("a.text", "größe")
    writer.add_uint32("a.number", 2**32 - 1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = (tmp_path / "theirs.gguf").read_bytes()
    assert gguf_bytes(METADATA, tensors) == theirs
    np.testing.assert_array_equal(read_gguf(theirs).tensors["matrix"], tensors["matrix"], strict=True)


def test_the_gguf_package_reads_what_is_written() -> None:
    reader = gguf.GGUFReader(FILES / "written.gguf")
    ours = read_gguf((FILES / "written.gguf").read_bytes())
    assert {tensor.name for tensor in reader.tensors} == set(ours.tensors) == {"direction.1", "direction.2"}
    for tensor in reader.tensors:
        np.testing.assert_array_equal(np.asarray(tensor.data), ours.tensors[tensor.name], strict=True)


def test_metadata_of_every_type_is_read_past(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "full.gguf", "controlvector")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 5)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["one", "two"])
    writer.add_custom_alignment(64)
    writer.add_tensor("direction.3", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf((tmp_path / "full.gguf").read_bytes())
    expected = {
        "a.uint8": 5,
        "a.int64": 5,
        "a.float64": 0.25,
        "a.bool": True,
        "a.numbers": "[3]",
        "a.texts": "[2]",
    }
    assert expected.items() <= found.metadata.items()
    np.testing.assert_array_equal(found.tensors["direction.3"], np.arange(5, dtype=np.float32), strict=True)


def test_a_file_cut_short_anywhere_is_refused() -> None:
    data = REPENG.rstrip(b"\0")
    for size in range(len(data) - 4):  # the last float may end in zero bytes
        with pytest.raises(InputError):
            read_gguf(data[:size])


@given(st.integers(0, len(REPENG) - 1), st.binary(min_size=1, max_size=9))
def test_a_damaged_file_is_read_or_refused(place: int, damage: bytes) -> None:
    try:
        read_gguf(REPENG[:place] + damage + REPENG[place + len(damage) :])
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; this release reads 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"claims {2**60} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), f"claims {2**60} metadata entries"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("a", 9, struct.pack("<IQ", 9, 1)),
            "array of GGUF type 9",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("abcdef", 77, b""), "GGUF type 77"),
        (gguf_bytes({"general.alignment": 48}, {}), "expected a power of two"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * entry("abcdef", 4, b"1234"),
            "'abcdef' stands in it twice",
        ),
    ],
)
def test_what_is_wrong_is_named(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_gguf(content)


def test_tensors_of_other_types_are_refused() -> None:
    content = bytearray(gguf_bytes({}, {"direction.1": np.zeros(4, np.float32)}))
    name = content.index(b"direction.1") + len(b"direction.1")
    content[name + 12] = 1  # float16
    with pytest.raises(InputError, match=r"'direction\.1' is of GGUF type 1; expected 0, float32"):
        read_gguf(bytes(content))
