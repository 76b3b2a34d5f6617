"""ONNX files by reference: graphs are read and written, weights in external data files never are."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from calibration.errors import InputError
from graph_passes.graph_index import subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class ExternalFile:
    """A file of external data, relative to its graph's folder, and the bytes the graph needs of it."""

    location: str
    bytes_needed: int


def read_graph(path: str | Path) -> ModelProto:
    """Read a graph, its weights left in their files, and check that those files are there and long enough.

    Raises `InputError` when the file is missing, is not ONNX, or lacks its external data.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"ONNX file {source}: no such file")
    try:
        model = onnx.load(source, format="protobuf", load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(
            f"ONNX file {source}: not a readable ONNX model; is it truncated? ({error})"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError(f"ONNX file {source}: holds no graph; expected a decoder")
    try:
        files = external_files(model)
    except InputError as error:
        raise InputError(f"ONNX file {source}: {error}") from None
    for file in files:
        data = source.parent / file.location
        if not data.is_file():
            raise InputError(f"ONNX file {source}: its external data {file.location} is missing beside it")
        size = data.stat().st_size
        if size < file.bytes_needed:
            raise InputError(
                f"ONNX file {source}: its external data {file.location} has {size} bytes; "
                f"expected at least {file.bytes_needed}"
            )
    return model


def write_graph(model: ModelProto, path: str | Path) -> None:
    """Write a graph file, whole or not at all; external data stays where it is."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(model.SerializeToString())
        partial.replace(target)
    except (EncodeError, ValueError) as error:
        raise InputError(
            f"{target}: the graph is over protobuf's 2 GiB; keep its weights in external data ({error})"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def copy_external_data(model: ModelProto, source: Path, target: Path) -> None:
    """Copy the external data files of `model` from folder `source` to folder `target`, as regular files."""
    if source.resolve() == target.resolve():
        return
    for file in external_files(model):
        destination = target / file.location
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file.location, destination)


def external_files(model: ModelProto) -> list[ExternalFile]:
    """The external data files a graph refers to, each once.

    Raises `InputError` for a location outside the graph's folder.
    """
    needed: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if not uses_external_data(tensor):
            continue
        try:
            info = ExternalDataInfo(tensor)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"tensor {tensor.name!r}: its external data entry is damaged ({error})"
            ) from error
        windows = PureWindowsPath(info.location)  # takes both kinds of separator
        if not info.location or windows.drive or windows.root or ".." in windows.parts:
            raise InputError(
                f"tensor {tensor.name!r}: external data location {info.location!r} leaves the graph's folder"
            )
        end = (info.offset or 0) + (info.length or 0)
        needed[info.location] = max(needed.get(info.location, 0), end)
    return [ExternalFile(location, needed[location]) for location in sorted(needed)]


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
        for body in subgraphs(node):
            yield from _tensors(body)
