"""ONNX files by reference: graphs are read and written, weights in external data files never are.

A file may come from anywhere. What it claims is checked against what there is, before anything follows a
location out of the folder or allocates by a size that the file only says it has.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import uses_external_data

from calibration.errors import InputError
from graph_passes.graph_index import subgraphs
from graph_passes.tensor_sizes import check_inline_size, tensor_bytes
from graph_passes.well_formed import check_well_formed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGEST_GRAPH_BYTES = 2**31 - 1
"""What protobuf reads; a larger file is refused before it is read into memory."""
LONGEST_SHOWN = 80
"""Characters of a location that an error message shows."""


@dataclass(frozen=True)
class ExternalFile:
    """A file of external data, relative to its graph's folder, and the bytes the graph needs of it."""

    location: str
    bytes_needed: int


def read_graph(path: str | Path) -> ModelProto:
    """Read a graph, its weights left in their files, and check that those files are there and long enough.

    External data must be regular files within the graph's folder, links followed. Raises `InputError` when
    the file is missing, is not ONNX, holds a tensor of another size than it claims, or lacks its external data.
    """
    source = Path(path)
    if not source.is_file():
        what = "not a regular file" if source.exists() and not source.is_dir() else "no such file"
        raise InputError(f"ONNX file {source}: {what}")
    size = source.stat().st_size
    if size > LARGEST_GRAPH_BYTES:
        raise InputError(
            f"ONNX file {source}: has {size} bytes; a graph has at most {LARGEST_GRAPH_BYTES}, "
            "its weights belong in external data"
        )
    try:
        model = onnx.load(source, format="protobuf", load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(
            f"ONNX file {source}: not a readable ONNX model; is it truncated? ({error})"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError(f"ONNX file {source}: holds no graph; expected a decoder")
    try:
        check_well_formed(model)
        for file in _check_tensors(model):
            _check_data_file(source.parent, file)
    except InputError as error:
        raise InputError(f"ONNX file {source}: {error}") from None
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


def external_files(model: ModelProto) -> list[ExternalFile]:
    """The external data files a graph refers to, each once.

    Raises `InputError` for a location outside the graph's folder.
    """
    return _listed(tensor for tensor in tensors(model) if uses_external_data(tensor))


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor a model holds: initializers, and those in attributes, bodies and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _check_tensors(model: ModelProto) -> list[ExternalFile]:
    """Check every tensor's claimed size; the files of those that lie outside."""
    outside = []
    for tensor in tensors(model):
        if uses_external_data(tensor):
            outside.append(tensor)
        else:
            check_inline_size(tensor)
    return _listed(outside)


def _listed(outside: Iterable[TensorProto]) -> list[ExternalFile]:
    needed: dict[str, int] = {}
    for tensor in outside:
        location, end = _external_range(tensor)
        needed[location] = max(needed.get(location, 0), end)
    return [ExternalFile(location, needed[location]) for location in sorted(needed)]


def _external_range(tensor: TensorProto) -> tuple[str, int]:
    """The file a tensor's values lie in, and the byte behind the last of them."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:  # readers differ in which of the two they take
            raise InputError(
                f"tensor {tensor.name!r}: its external data entry is damaged (two of {entry.key!r})"
            )
        entries[entry.key] = entry.value
    location, size = entries.get("location", ""), tensor_bytes(tensor)
    windows = PureWindowsPath(location)  # takes both kinds of separator
    if not location or "\0" in location or windows.drive or windows.root or ".." in windows.parts:
        raise InputError(
            f"tensor {tensor.name!r}: external data location {_shown(location)} leaves the graph's folder"
        )
    offset = _whole_number(tensor, "offset", entries.get("offset", "0"))
    length = _whole_number(tensor, "length", entries.get("length", str(size or 0)))
    if size is not None and length != size:
        raise InputError(
            f"tensor {tensor.name!r} has {length} bytes of external data; expected {size} for its type and "
            f"dimensions {tuple(tensor.dims)}; the file is damaged"
        )
    return location, offset + length


def _whole_number(tensor: TensorProto, key: str, text: str) -> int:
    """An entry's value: decimal digits only, as every reader takes them."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(2**63)):
        raise InputError(
            f"tensor {tensor.name!r}: its external data entry is damaged ({key} is {_shown(text)})"
        )
    return int(text)


def _shown(text: str) -> str:
    """Text of the file in quotes, on one line and not too long."""
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…")


def _check_data_file(folder: Path, file: ExternalFile) -> None:
    """Raise `InputError` unless `file` is regular, within `folder` with all links followed, and long enough."""
    data, shown = folder / file.location, _shown(file.location)[1:-1]
    try:
        found = data.stat()
        inside = data.resolve(strict=True).is_relative_to(folder.resolve(strict=True))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"its external data {shown} is missing beside it") from None
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"its external data {shown} cannot be reached ({reason})") from None
    if not inside:
        raise InputError(
            f"its external data {shown} is a link, or lies behind one, that leaves the graph's folder; "
            "put a copy of the file in its place"
        )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"its external data {shown} is missing beside it: what is there is not a regular file"
        )
    if found.st_size < file.bytes_needed:
        raise InputError(
            f"its external data {shown} has {found.st_size} bytes; expected at least {file.bytes_needed}"
        )


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for body in subgraphs(node):
            yield from _graph_tensors(body)
