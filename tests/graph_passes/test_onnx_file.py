"""ONNX files by reference: what is read, what is refused, and that weights stay where they are."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize(("key", "value"), [("offset", "many"), ("length", "-8"), ("offset", "-1")])
def test_a_damaged_external_data_entry_is_refused(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "model.onnx").write_bytes(model_with(w=AT | {key: value}).SerializeToString())
    refused(tmp_path / "model.onnx", "tensor 'w': its external data entry is damaged")


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
