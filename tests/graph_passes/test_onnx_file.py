"""ONNX files by reference: what is read, what is refused, and that weights stay where they are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import InputError
from graph_passes.onnx_file import ExternalFile, external_files, read_graph, write_graph


def model_with(**locations: dict[str, str]) -> onnx.ModelProto:
    """A graph with one initializer per entry, which refers to external data as told."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])]
    )
    for name, entries in locations.items():
        tensor = graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=[2])
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in entries.items():
            tensor.external_data.add(key=key, value=text)
    return helper.make_model(graph)


AT = {"location": "weights.bin", "offset": "8", "length": "8"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    onnx.save(model_with(w=AT), tmp_path / "model.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(range(16)))
    return tmp_path / "model.onnx"


def test_a_graph_is_read_without_its_weights(saved: Path) -> None:
    model = read_graph(saved)
    assert model == model_with(w=AT)
    assert external_files(model) == [ExternalFile("weights.bin", 16)]


def test_each_file_is_listed_once_with_the_bytes_it_needs() -> None:
    model = model_with(
        a=AT, b={"location": "weights.bin", "offset": "64", "length": "8"}, c={"location": "sub/other.bin"}
    )
    assert external_files(model) == [ExternalFile("sub/other.bin", 8), ExternalFile("weights.bin", 72)]


def test_tensors_of_constant_nodes_and_of_bodies_count() -> None:
    tensor = model_with(w=AT).graph.initializer[0]
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_graph([constant], "body", [], [onnx.ValueInfoProto(name="c")])
    for node in (constant, helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body)):
        model = model_with()
        model.graph.node.append(node)
        assert external_files(model) == [ExternalFile("weights.bin", 16)]


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"ONNX file {path}: ") + ".*" + message):
        read_graph(path)


def test_missing_external_data_is_refused(saved: Path) -> None:
    (saved.parent / "weights.bin").unlink()
    refused(saved, "its external data weights.bin is missing beside it")
    (saved.parent / "weights.bin").mkdir()
    refused(saved, "its external data weights.bin is missing beside it")


def test_external_data_that_is_too_short_is_refused(saved: Path) -> None:
    (saved.parent / "weights.bin").write_bytes(bytes(15))
    refused(saved, "weights.bin has 15 bytes; expected at least 16")


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "a/../../weights.bin",
        "/etc/passwd",
        "..",
        "",
        "..\\weights.bin",
        "C:\\w",
        "C:w",
        "\\w",
    ],
)
def test_a_location_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    model = model_with(w=AT)
    model.graph.initializer[0].external_data[0].value = location
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "model.onnx", "tensor 'w': external data location .* leaves the graph's folder")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "many"),
        ("length", "-8"),
        ("offset", "-1"),
        ("offset", ""),
        ("offset", " 8"),
        ("length", "8.0"),
        ("length", "1_0"),
        ("offset", "٨"),
        ("offset", "9" * 5000),
    ],
)
def test_a_damaged_external_data_entry_is_refused(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "model.onnx").write_bytes(model_with(w=AT | {key: value}).SerializeToString())
    refused(tmp_path / "model.onnx", "tensor 'w': its external data entry is damaged")


def test_two_entries_of_one_kind_are_refused(tmp_path: Path) -> None:
    """Readers differ in which they take: one of them might take that which was not checked."""
    model = model_with(w=AT)
    model.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "model.onnx", r"its external data entry is damaged \(two of 'location'\)")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", str(2**62), rf"weights.bin has 16 bytes; expected at least {2**62 + 8}"),
        ("offset", "9", "weights.bin has 16 bytes; expected at least 17"),
        ("length", str(2**62), rf"tensor 'w' has {2**62} bytes of external data; expected 8"),
        ("length", "0", "tensor 'w' has 0 bytes of external data; expected 8"),
    ],
)
def test_an_offset_or_length_that_lies_is_refused(saved: Path, key: str, value: str, message: str) -> None:
    saved.write_bytes(model_with(w=AT | {key: value}).SerializeToString())
    refused(saved, message)


def test_dimensions_that_lie_are_refused(saved: Path) -> None:
    model = model_with(w=AT)
    model.graph.initializer[0].dims[:] = [1 << 50, 1 << 50]
    saved.write_bytes(model.SerializeToString())
    refused(saved, f"tensor 'w' has 8 bytes of external data; expected {4 << 100}")
    model = model_with()
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1 << 60], raw_data=b"1234")
    saved.write_bytes(model.SerializeToString())
    refused(saved, f"tensor 'w' has 4 bytes; expected {4 << 60}")


def hidden(model: onnx.ModelProto, where: str, tensor: TensorProto) -> None:
    """Put a tensor where graphs seldom have one."""
    if where == "function":
        constant = helper.make_node("Constant", [], ["c"], value=tensor)
        model.functions.append(
            helper.make_function("local", "F", [], ["c"], [constant], [helper.make_opsetid("", 20)])
        )
        return
    node = model.graph.node.add(op_type="Constant", output=["c"])
    attribute = node.attribute.add(name="value")
    if where == "tensors":
        attribute.type = onnx.AttributeProto.TENSORS
        attribute.tensors.append(tensor)
    elif where == "sparse_tensor":
        attribute.type = onnx.AttributeProto.SPARSE_TENSOR
        attribute.sparse_tensor.values.CopyFrom(tensor)
    elif where == "sparse_tensors":
        attribute.type = onnx.AttributeProto.SPARSE_TENSORS
        attribute.sparse_tensors.add().indices.CopyFrom(tensor)
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)


@pytest.mark.parametrize(
    "where", ["function", "tensors", "sparse_tensor", "sparse_tensors", "sparse_initializer"]
)
def test_no_tensor_is_overlooked(tmp_path: Path, where: str) -> None:
    model = model_with()
    hidden(model, where, model_with(w=AT | {"location": "../../secret"}).graph.initializer[0])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    refused(
        tmp_path / "model.onnx", "tensor 'w': external data location '../../secret' leaves the graph's folder"
    )


def link_to_outside(folder: Path, outside: Path) -> None:
    (folder / "weights.bin").symlink_to(outside / "weights.bin")


def folder_that_links_outside(folder: Path, outside: Path) -> None:
    (folder / "sub").symlink_to(outside)


def link_by_way_of_a_link(folder: Path, outside: Path) -> None:
    (folder / "up").symlink_to("..")
    (folder / "weights.bin").symlink_to(Path("up") / outside.name / "weights.bin")


@pytest.mark.parametrize(
    ("make", "location"),
    [
        (link_to_outside, "weights.bin"),
        (folder_that_links_outside, "sub/weights.bin"),
        (link_by_way_of_a_link, "weights.bin"),
    ],
)
def test_a_link_out_of_the_folder_is_refused(
    tmp_path: Path, make: Callable[[Path, Path], None], location: str
) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for place in (folder, outside):
        place.mkdir()
    (outside / "weights.bin").write_bytes(bytes(16))
    make(folder, outside)
    (folder / "model.onnx").write_bytes(model_with(w=AT | {"location": location}).SerializeToString())
    refused(folder / "model.onnx", f"its external data {location} is a link.*leaves the graph's folder.*copy")


def test_links_within_the_folder_hard_links_and_a_folder_behind_a_link_are_read(
    saved: Path, tmp_path: Path
) -> None:
    """Stores without duplicates hard link equal files; we only never make links ourselves."""
    (saved.parent / "sub").mkdir()
    (saved.parent / "weights.bin").rename(saved.parent / "sub" / "blob")
    (saved.parent / "weights.bin").symlink_to("sub/blob")
    (saved.parent / "sub" / "twin").hardlink_to(saved.parent / "sub" / "blob")
    assert read_graph(saved) == model_with(w=AT)
    (tmp_path / "elsewhere").symlink_to(saved.parent)
    assert read_graph(tmp_path / "elsewhere" / saved.name) == model_with(w=AT)


def test_a_loop_of_links_is_refused(saved: Path) -> None:
    (saved.parent / "weights.bin").unlink()
    (saved.parent / "weights.bin").symlink_to("weights.bin")
    refused(saved, "its external data weights.bin cannot be reached")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(saved: Path) -> None:
    (saved.parent / "weights.bin").unlink()
    os.mkfifo(saved.parent / "weights.bin")
    refused(saved, "its external data weights.bin is missing beside it.*not a regular file")
    os.mkfifo(saved.parent / "pipe.onnx")
    refused(saved.parent / "pipe.onnx", "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")


@pytest.mark.parametrize("location", ["w" * 5000, "a/" * 5000 + "w", "weights.bin/inside", "two\nlines"])
def test_a_location_that_cannot_be_is_one_line(saved: Path, location: str) -> None:
    saved.write_bytes(model_with(w=AT | {"location": location}).SerializeToString())
    with pytest.raises(InputError, match=r"(cannot be reached|is missing beside it)") as raised:
        read_graph(saved)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_location_with_a_zero_byte_is_refused(saved: Path) -> None:
    saved.write_bytes(model_with(w=AT | {"location": "weights.bin\0.txt"}).SerializeToString())
    refused(saved, "leaves the graph's folder")


def nested(levels: int) -> bytes:
    """A body in a body in a body, to that depth."""
    graph = model_with().graph
    for _ in range(levels):
        outer = onnx.GraphProto()
        outer.CopyFrom(model_with().graph)
        outer.node.append(helper.make_node("If", ["x"], ["z"], then_branch=graph))
        graph = outer
    return onnx.ModelProto(ir_version=9, graph=graph).SerializeToString()


def message(field: int, content: bytes) -> bytes:
    """One length-delimited field of a protobuf message."""
    length, size = len(content), bytearray()
    while True:
        size.append(length & 127 | (128 if length > 127 else 0))
        length >>= 7
        if not length:
            return bytes([field << 3 | 2]) + bytes(size) + content


def bottomless(levels: int) -> bytes:
    """ModelProto.graph (7) of GraphProto.node (1) of NodeProto.attribute (5) of AttributeProto.g (6) and so on."""
    content = b""
    for _ in range(levels):
        content = message(1, message(5, message(6, content)))
    return message(7, content)


@pytest.mark.parametrize(
    "content",
    [
        bottomless(2000),
        message(7, b"")[:1] + b"\xff\xff\xff\xff\x07",  # a graph of 2 GiB, of which nothing is there
        message(7, b"")[:1] + b"\xff" * 9 + b"\x01",  # a length of 2^64 - 1
        model_with().SerializeToString() + message(7, message(5, b"\x0a\xff\xff\xff\x7f")),
    ],
    ids=["nesting", "length", "negative length", "length within"],
)
def test_a_protobuf_bomb_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refused(tmp_path / "model.onnx", "not a readable ONNX model")


def test_bodies_as_deep_as_protobuf_reads_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(nested(25))
    assert external_files(read_graph(tmp_path / "model.onnx")) == []


def test_a_graph_over_what_protobuf_holds_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(1 << 42)  # sparse, and more than there is memory
    refused(tmp_path / "model.onnx", f"has {1 << 42} bytes; a graph has at most {2**31 - 1}")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_and_random_damage_are_refused_or_read(saved: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    saved.write_bytes(random.bytes(4096))
    refused(saved, "(not a readable ONNX model|holds no graph)")
    damaged = bytearray(model_with(a=AT, b=AT).SerializeToString())
    for position in random.integers(len(damaged), size=3):
        damaged[position] = random.integers(256)
    saved.write_bytes(bytes(damaged))
    with contextlib.suppress(InputError):
        read_graph(saved)


def test_a_missing_file_or_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "no such file")
    refused(tmp_path, "no such file")


def test_a_truncated_file_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved, "(is it truncated|holds no graph)")


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.onnxtxt", "model.textproto"])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, name: str) -> None:
    """Whatever its ending says: a graph is protobuf."""
    (tmp_path / name).write_bytes(b"\x7fELF nothing of the kind")
    refused(tmp_path / name, "(not a readable ONNX model|holds no graph)")


def test_a_file_without_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx.ModelProto(ir_version=9).SerializeToString())
    refused(tmp_path / "model.onnx", "holds no graph")


def test_writing_leaves_external_data_and_no_partial_file(saved: Path) -> None:
    before = (saved.parent / "weights.bin").stat()
    model = read_graph(saved)
    write_graph(model, saved.with_name("other.onnx"))
    write_graph(model, saved.with_name("other.onnx"))
    assert read_graph(saved.with_name("other.onnx")) == model
    assert (saved.parent / "weights.bin").stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model.onnx", "other.onnx", "weights.bin"]


def test_weights_inside_the_graph_need_no_file(tmp_path: Path) -> None:
    model = model_with()
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2]), "w"))
    onnx.save(model, tmp_path / "model.onnx")
    assert external_files(read_graph(tmp_path / "model.onnx")) == []
