"""Real copies of external data: never links, of either kind, and never a part of a copy under its own name.

Where the filesystem can, a copy is a clone (reflink): done at once, it takes no room until one of the two is
changed. Elsewhere the bytes are streamed, if there is room for all of them.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import PurePath
from typing import TYPE_CHECKING

from onnx.external_data_helper import uses_external_data

from calibration.errors import InputError
from graph_passes.onnx_file import external_files, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from onnx import ModelProto

    Progress = Callable[[str, int, int], None]
    """Told a stage, and how many of its parts are done of how many."""

FICLONE = 0x40049409
"""Linux's ioctl that makes one file a clone of another; see `man 2 ioctl_ficlone`."""
NO_CLONE = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
)
"""How a filesystem, or two of them, says that it cannot clone."""
CHUNK_BYTES = 2**24
MEBIBYTE = 2**20
STAGE = "copy weights (MiB)"


def copied_locations(model: ModelProto, graph_name: str) -> dict[str, str]:
    """Names of their own for copies of a graph's external data that lie in the folder of the originals.

    One file becomes `<graph_name>.data`, several `<graph_name>.data.0` and so on, in the order of their names.
    """
    locations = [file.location for file in external_files(model)]
    files = sorted({PurePath(location) for location in locations})  # `./x` is `x`
    if len(files) == 1:
        return dict.fromkeys(locations, f"{graph_name}.data")
    return {location: f"{graph_name}.data.{files.index(PurePath(location))}" for location in locations}


def relocate(model: ModelProto, locations: Mapping[str, str]) -> None:
    """Make a graph refer to its external data by other locations; offsets and lengths stay."""
    for tensor in tensors(model):
        if uses_external_data(tensor):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = locations[entry.value]


def copy_files(copies: Mapping[Path, Path], *, room_for: int = 0, progress: Progress | None = None) -> None:
    """Copy files to paths that do not exist yet; what fails leaves parts behind, so copy into a staging folder.

    Copies get the modes of new files, whatever those of the originals are: exporters often write 0600.
    `room_for`: bytes that will be written besides. Raises `InputError` before a byte is written when there is
    no room for all that cannot be cloned, and when a file changes its size meanwhile.
    """
    for copy in copies.values():
        copy.parent.mkdir(parents=True, exist_ok=True)
    streamed = {source: copy for source, copy in copies.items() if not clone(source, copy)}
    if not streamed:
        return
    sizes = {source: source.stat().st_size for source in streamed}
    total = sum(sizes.values())
    folder = next(iter(streamed.values())).parent
    free = shutil.disk_usage(folder).free
    if total + room_for > free:
        raise InputError(
            f"no space left for a copy of the external data: it needs {total + room_for} bytes, {folder} has {free} "
            "free; write beside the decoder without --copy, to share its data, or elsewhere"
        )
    done = 0
    for source, copy in streamed.items():
        _stream(source, copy, done, total, progress)
        if copy.stat().st_size != sizes[source]:
            raise InputError(
                f"{source}: had {sizes[source]} bytes and, once copied, {copy.stat().st_size}; something writes to it"
            )
        done += sizes[source]
    if progress is not None:
        progress(STAGE, _mebibytes(total), _mebibytes(total))


def clone(source: Path, copy: Path) -> bool:
    """Make the new file `copy` a clone of `source` that shares its blocks; False, and no file, where that cannot be."""
    try:
        from fcntl import ioctl
    except ImportError:  # not on Windows
        return False
    with source.open("rb") as read, copy.open("xb") as written:
        try:
            ioctl(written.fileno(), FICLONE, read.fileno())
        except OSError as error:
            if error.errno not in NO_CLONE:
                raise
        else:
            return True
    copy.unlink()
    return False


def _stream(source: Path, copy: Path, before: int, total: int, progress: Progress | None) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = before
    with source.open("rb", buffering=0) as read, copy.open("xb", buffering=0) as written:
        while count := read.readinto(buffer):
            rest = buffer[:count]
            while rest:
                rest = rest[written.write(rest) :]
            done += count
            if progress is not None and done < total:
                progress(STAGE, done // MEBIBYTE, _mebibytes(total))


def _mebibytes(size: int) -> int:
    """Rounded up, so that what was copied is all done only when it is."""
    return -(-size // MEBIBYTE)
