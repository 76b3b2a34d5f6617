"""The float32 twin of a bfloat16 graph: the same nodes, wires and values, in a type that every runtime computes in.

A bfloat16 is a float32 whose lower 16 bits are zero, so that every value stays exact. What the twin lacks are
the roundings of bfloat16 arithmetic: its casts to bfloat16 became casts to float32.
"""

from __future__ import annotations

import math
import posixpath
import shutil
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import FunctionProto, GraphProto, TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from calibration.errors import InputError
from graph_passes.graph_index import subgraphs
from graph_passes.onnx_file import read_graph, write_graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from onnx import AttributeProto, ModelProto, TypeProto, ValueInfoProto

ELEM_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "stash_type", "output_dtype", "output_datatype", "precision", "softmax_precision"}
)
"""Integer attributes of ONNX's operators that name an element type."""
PAGE_BYTES = 4096
"""Tensors start at multiples of this, so that runtimes can map them."""
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, order=True)
class _Region:
    """Bytes of a file of external data that hold one tensor; `widen`: they are bfloat16."""

    location: str
    offset: int
    length: int
    widen: bool

    @property
    def twin_length(self) -> int:
        return 2 * self.length if self.widen else self.length


def write_float32_twins(sources: Sequence[Path], folder: Path) -> None:
    """Write the float32 twins of bfloat16 ONNX files that lie in one folder into another, names kept.

    Files of external data that sources share are shared by their twins, under their own names; they are
    streamed, so that no more than a few megabytes of them are held. Graph files are written last. `folder`
    must exist; what it holds after an error is incomplete. Raises
    `InputError` when a source is no graph, damaged, or `folder` lacks the space, `ValueError` for a graph
    without any bfloat16 or sources in several folders or in `folder` itself.
    """
    home = sources[0].parent
    if any(source.parent != home for source in sources) or home.resolve() == folder.resolve():
        raise ValueError(
            f"sources must lie in one folder other than {folder}: {', '.join(map(str, sources))}"
        )
    graphs = {source: read_graph(source) for source in sources}
    regions: set[_Region] = set()
    for source, graph in graphs.items():
        regions |= _regions(graph, source)
    places = _places(regions)
    _check_space(folder, places, graphs)
    for source, graph in graphs.items():
        if not _widen(graph, source, places):
            raise ValueError(f"{source}: holds no bfloat16; it is its own twin")
    _write_data(places, home, folder)
    for source, graph in graphs.items():
        write_graph(graph, folder / source.name)


def _regions(graph: ModelProto, source: Path) -> set[_Region]:
    return {_region(tensor, source) for tensor in filter(uses_external_data, _tensors(graph))}


def _region(tensor: TensorProto, source: Path) -> _Region:
    """Where a tensor's values lie. Raises `InputError` when they are not as many bytes as its shape needs."""
    info = ExternalDataInfo(tensor)
    offset = info.offset or 0
    length = info.length
    if length is None:
        length = (source.parent / info.location).stat().st_size - offset
    widen = tensor.data_type == TensorProto.BFLOAT16
    if widen and length != (needed := 2 * math.prod(tensor.dims)):
        raise InputError(
            f"ONNX file {source}: tensor {tensor.name!r} has {length} bytes of external data; expected {needed} for "
            f"bfloat16 of shape {tuple(tensor.dims)}; is the file damaged?"
        )
    return _Region(posixpath.normpath(info.location), offset, length, widen)


def _places(regions: Iterable[_Region]) -> dict[_Region, int]:
    """The offset of every region in its twin file: in the order of the source, from page to page."""
    ends: dict[str, int] = defaultdict(int)
    places = {}
    for region in sorted(regions):
        places[region] = -(-ends[region.location] // PAGE_BYTES) * PAGE_BYTES
        ends[region.location] = places[region] + region.twin_length
    return places


def _check_space(folder: Path, places: Mapping[_Region, int], graphs: Mapping[Path, ModelProto]) -> None:
    needed = sum(region.twin_length + PAGE_BYTES for region in places)
    needed += sum(2 * graph.ByteSize() for graph in graphs.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: the float32 twin of the bfloat16 graphs needs about {needed / 1e6:,.0f} MB while it is "
            f"checked; {free / 1e6:,.0f} MB are free there; free some, or name a larger place in TMPDIR"
        )


def _write_data(places: Mapping[_Region, int], home: Path, folder: Path) -> None:
    """Write the twins of the files of external data, each from front to back."""
    for location in sorted({region.location for region in places}):
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        with (home / location).open("rb") as source, target.open("wb") as written:
            for region, place in places.items():
                if region.location == location:
                    written.write(bytes(place - written.tell()))
                    source.seek(region.offset)
                    for chunk in _chunks(source, region.length):
                        written.write(_widened(chunk) if region.widen else chunk)


def _chunks(source: BinaryIO, length: int) -> Iterator[bytes]:
    for start in range(0, length, CHUNK_BYTES):
        wanted = min(CHUNK_BYTES, length - start)
        chunk = source.read(wanted)
        if len(chunk) < wanted:
            missing = length - start - len(chunk)
            raise InputError(f"{source.name}: ended {missing} bytes early; did it change meanwhile?")
        yield chunk


def _widened(bfloat16: bytes) -> bytes:
    """Little-endian bfloat16 as little-endian float32: the same bits, zeros below them."""
    return (np.frombuffer(bfloat16, dtype="<u2").astype("<u4") << 16).tobytes()


def _widen(graph: ModelProto, source: Path, places: Mapping[_Region, int]) -> int:
    """Turn every bfloat16 of a graph into float32 and refer to the twins of its data; how many there were."""
    found = sum(_widen_tensor(tensor, source, places) for tensor in _tensors(graph))
    for scope in _scopes(graph):
        found += sum(_widen_type(value.type) for value in _values(scope))
        for attribute in _attributes(scope):
            found += sum(_widen_type(kind) for kind in (attribute.tp, *attribute.type_protos))
            if attribute.name in ELEM_TYPE_ATTRIBUTES and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
                found += 1
    return found


def _widen_tensor(tensor: TensorProto, source: Path, places: Mapping[_Region, int]) -> bool:
    is_bfloat16 = tensor.data_type == TensorProto.BFLOAT16
    if uses_external_data(tensor):
        region = _region(tensor, source)
        del tensor.external_data[:]
        entries = {"location": region.location, "offset": places[region], "length": region.twin_length}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
    elif is_bfloat16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.ClearField("int32_data")
        tensor.raw_data = numpy_helper.from_array(values).raw_data
    if is_bfloat16:
        tensor.data_type = TensorProto.FLOAT
    return is_bfloat16


def _widen_type(kind: TypeProto) -> bool:
    """Turn a type into float32 where it is, or holds, bfloat16."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        widen = bool(tensor.elem_type == TensorProto.BFLOAT16)
        if widen:
            tensor.elem_type = TensorProto.FLOAT
        return widen
    if which in ("sequence_type", "optional_type"):
        return _widen_type(getattr(kind, which).elem_type)
    return which == "map_type" and _widen_type(kind.map_type.value_type)


def _scopes(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """Everything that holds nodes: the graph, the model's functions, and the bodies of their nodes."""
    waiting: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
    while waiting:
        scope = waiting.pop()
        waiting.extend(body for node in scope.node for body in subgraphs(node))
        yield scope


def _attributes(scope: GraphProto | FunctionProto) -> Iterator[AttributeProto]:
    for node in scope.node:
        yield from node.attribute
    if isinstance(scope, FunctionProto):
        yield from scope.attribute_proto


def _values(scope: GraphProto | FunctionProto) -> Iterator[ValueInfoProto]:
    yield from scope.value_info
    if isinstance(scope, GraphProto):
        yield from (*scope.input, *scope.output)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for scope in _scopes(model):
        if isinstance(scope, GraphProto):
            yield from scope.initializer
            for sparse in scope.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in _attributes(scope):
            yield from ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
