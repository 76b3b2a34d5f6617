"""Write a decoder made from another: beside it sharing its external data, or with a copy of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from graph_passes.external_copy import copied_locations, copy_files, relocate
from graph_passes.onnx_file import external_files, write_graph
from sarsteer_export.staging import check_output, staged_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx import ModelProto

    from graph_passes.external_copy import Progress


def check_output_name(graph: ModelProto, source: Path, target: Path) -> None:
    """Raise `InputError` when `target` is external data of the decoder `source`, or has the name of its copy."""
    for file in external_files(graph):
        if Path(target.name) == Path(file.location) or _place(target) == _place(
            source.parent / file.location
        ):
            raise InputError(f"{target}: is the name of the decoder's external data; name another output")


def write_decoder(
    graph: ModelProto,
    source: Path,
    target: Path,
    *,
    overwrite: bool,
    copy: bool = False,
    kept: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write a graph made from `source`: beside it sharing its external data, elsewhere with a copy of it.

    With `copy`, the data is copied beside it too, and `graph` made to refer to the copy. `kept`: files that are
    never overwritten. Raises `InputError` when the output, or data that would be copied, exists and may not be
    overwritten, or there is no room.
    """
    beside = _place(target.parent) == _place(source.parent)
    locations = {file.location: file.location for file in external_files(graph)}
    if beside:
        locations = copied_locations(graph, target.name) if copy else {}
    check_output(target, overwrite=overwrite)
    _check_kept(kept, [target, *(target.parent / location for location in locations.values())])
    _check_places(source, target, locations, overwrite=overwrite)
    with staged_file(target, overwrite=overwrite) as staged:
        copies = {source.parent / old: staged.parent / new for old, new in locations.items()}
        copy_files(copies, room_for=graph.ByteSize(), progress=progress)
        if locations:
            relocate(graph, locations)
        write_graph(graph, staged)


def _check_kept(kept: Sequence[Path], written: Sequence[Path]) -> None:
    """Raise `InputError` when what is written would replace a file that was read, or the link it was read by."""
    places = {_place(path) for path in written}
    for path in kept:
        if {_place(path), path.resolve()} & places:
            raise InputError(f"{path}: is read, and would be written over; name another output")


def _check_places(source: Path, target: Path, locations: Mapping[str, str], *, overwrite: bool) -> None:
    """Raise `InputError` when copied data would replace a file that may not be replaced, or leave the folder."""
    own = {_place(source), *(_place(source.parent / location) for location in locations)}
    for place in (target.parent / location for location in locations.values()):
        if not _place(place).is_relative_to(_place(target.parent)):
            raise InputError(
                f"{place}: lies behind a link that leaves the output's folder; use another folder"
            )
        if _place(place) in own:
            raise InputError(
                f"{place}: belongs to the decoder, and a copy of its data would replace it; use another name"
            )
        if place.exists() and not overwrite:
            raise InputError(
                f"{place}: exists; the decoder's external data would replace it; use --overwrite, or another folder"
            )


def _place(path: Path) -> Path:
    """Where a path leads, but for a link of that name itself: writing replaces a link, and follows none."""
    return path.parent.resolve() / path.name
