"""Outputs appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError, SarsteerError
from sarsteer_export.bundle.manifest import FORMAT, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left in the disk quota",
    errno.EFBIG: "a file grew over the largest size allowed here (see ulimit -f)",
}
"""Errors of a writer that ran out of room, by errno."""
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (tokenizers, safetensors) show an errno in an exception of their own."""
NUMPY_WRITE_FAILED = ("problem writing element", "Not enough free space")
"""How numpy's `tofile` begins when a write came up short; its `OSError` has no errno."""
EXPORT_FILES = frozenset(
    f"{name}.onnx{data}"
    for name in ("decoder_model_merged", "audio_encoder", "embed_tokens")
    for data in ("", "_data")
)
"""What an export folder holds; a bundle's manifest lists what the bundle holds."""
RESULTS_JSON, RESULTS_MARKDOWN, RESULTS_PICTURE, OUTPUTS = (
    "results.json",
    "results.md",
    "results.svg",
    "outputs.jsonl",
)
RESULT_FILES = frozenset((RESULTS_JSON, RESULTS_MARKDOWN, RESULTS_PICTURE, OUTPUTS))
"""What a folder of results holds."""
SWEEP_JSON, SWEEP_MARKDOWN, SWEEP_PICTURE = "sweep.json", "sweep.md", "sweep.svg"
SWEEP_STATISTICS, SWEEP_PLAN = "statistics.safetensors", "plan.safetensors"
SWEEP_FILES = frozenset((SWEEP_JSON, SWEEP_MARKDOWN, SWEEP_PICTURE, SWEEP_STATISTICS, SWEEP_PLAN))
"""What the folder of a sweep holds."""
FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Raise `InputError` when `path` exists and may not be overwritten, or lies under a file.

    A folder with other people's files in it is never overwritten.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists; use --overwrite to replace it, or name another output")
    if target.is_dir() and (foreign := foreign_file(target)) is not None:
        raise InputError(
            f"{target}: holds {foreign}, which no bundle, export, results or sweep of ours have; it is not replaced, "
            "remove it yourself"
        )
    parent = nearest_folder(target)
    if not parent.is_dir():
        raise InputError(f"{target}: {parent} is not a directory")
    return target


def check_outside_bundle(path: str | Path) -> None:
    """Raise `InputError` for a file that would be written into a bundle, in place of one of its own or beside them."""
    target = Path(path)
    folder = target.parent.resolve()
    bundle = next((place for place in (folder, *folder.parents) if _is_bundle(place)), None)
    if bundle is None:
        return
    if target.exists():
        raise InputError(
            f"{target}: belongs to the bundle {bundle}, whose hashes and parity verdict would no longer "
            "hold; name an output outside the bundle with -o"
        )
    raise InputError(
        f"{target}: lies inside the bundle {bundle}, which holds nothing but what its manifest lists; name an output "
        "outside the bundle with -o"
    )


@contextmanager
def staged_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends well, and is removed when it does not.

    With `overwrite`, what stood at `path` is replaced at the end, and kept until then.
    """
    target = check_output(path, overwrite=overwrite)
    with _staging(target) as staging:
        folder, old = staging / "new", staging / "old"
        folder.mkdir()
        yield folder
        try:
            if target.exists():
                target.replace(old)
            folder.replace(target)
        except BaseException:
            if old.exists():
                old.replace(target)
            raise


@contextmanager
def staged_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file path to write; it becomes `path` when the block ends well. Files written beside it come along.

    With `overwrite`, what stood at `path`, and where those files go, is replaced at the end, and kept until then.
    """
    target = check_output(path, overwrite=overwrite)
    if target.is_dir():
        raise InputError(f"{target}: is a directory; expected the name of a file")
    with _staging(target) as staging:
        folder = staging / "new"
        folder.mkdir()
        yield folder / target.name
        whole = folder / target.name
        others = [file for file in folder.rglob("*") if file.is_file() and file != whole]
        _move(
            whole,
            target,
            {file: target.parent / file.relative_to(folder) for file in others},
            staging / "old",
        )


def _move(whole: Path, target: Path, places: Mapping[Path, Path], kept: Path) -> None:
    """Move `whole` to `target` when all files of `places` are in theirs; until then what stood there is kept.

    When a file cannot be moved, or on Ctrl-C, everything is put back.
    """
    kept.mkdir()
    made: list[Path] = []
    old = {place: kept / str(number) for number, place in enumerate(places.values())}
    try:
        for file, place in places.items():
            if place.is_dir():
                raise InputError(
                    f"{place}: is a directory; a file of that name is to be written; remove it yourself"
                )
            _make_folders(place.parent, made)
            if place.exists() or place.is_symlink():
                place.replace(old[place])
            file.replace(place)
        whole.replace(target)
    except BaseException:
        if not whole.exists():  # an interrupt after the last step: the output is complete
            raise
        for file, place in places.items():  # by what is where: an interrupt may fall between any two steps
            if not file.exists():
                place.replace(file)
            if old[place].exists() or old[place].is_symlink():
                old[place].replace(place)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def _is_bundle(folder: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return False


def foreign_file(folder: Path) -> str | None:
    """The first file in a folder that is of no bundle's manifest, export, results or sweep, if there is one."""
    known = set(EXPORT_FILES | RESULT_FILES | SWEEP_FILES)
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") == FORMAT:
            known = {MANIFEST, *manifest["files"]}
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return next((file for file in files if file not in known), None)


def out_of_room(error: Exception) -> str | None:
    """What ran out, when that is why a write failed; some libraries hide the errno, or lose it."""
    if isinstance(error, OSError) and str(error).startswith(NUMPY_WRITE_FAILED):
        return "a file could not be written whole; no space left, or over the largest size allowed here"
    shown = RUST_ERRNO.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(shown[1]) if shown else None
    return None if number is None else FULL.get(number)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`; when the block fails, the folders made for it are removed too."""
    made: list[Path] = []
    with _clear_write_errors(target):
        try:
            _make_folders(target.parent, made)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except BaseException:
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()
            raise


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make `folder` and its parents; those that were not there are noted in `made`."""
    if folder.is_dir():
        return
    _make_folders(folder.parent, made)
    folder.mkdir(exist_ok=True)
    made.append(folder)


@contextmanager
def _clear_write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except SarsteerError:
        raise
    except Exception as error:
        if reason := out_of_room(error):
            raise InputError(f"{target}: {reason}; nothing was written") from error
        if isinstance(error, OSError) and error.errno in FORBIDDEN and _concerns(error, target):
            raise InputError(
                f"{target}: cannot be written ({error.strerror}); nothing was written"
            ) from error
        raise


def _concerns(error: OSError, target: Path) -> bool:
    """Whether an error is about the output, and not about a file that is read meanwhile."""
    if error.filename is None:
        return True
    place, parent = Path(error.filename).absolute(), target.absolute().parent
    return place.is_relative_to(parent) or parent.is_relative_to(place)


def nearest_folder(target: Path) -> Path:
    """The closest thing above `target` that exists."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent
