"""Outputs appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Raise `InputError` when `path` exists and may not be overwritten, or lies under a file."""
    target = Path(path)
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists; use --overwrite to replace it, or name another output")
    parent = nearest_folder(target)
    if not parent.is_dir():
        raise InputError(f"{target}: {parent} is not a directory")
    return target


@contextmanager
def staged_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends well, and is removed when it does not.

    With `overwrite`, what stood at `path` is replaced at the end, and kept until then.
    """
    target = check_output(path, overwrite=overwrite)
    with _clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            folder = staging / "new"
            folder.mkdir()
            yield folder
            if target.exists():
                target.replace(staging / "old")
            folder.replace(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file path to write; it becomes `path` when the block ends well. Files written beside it come along."""
    target = check_output(path, overwrite=overwrite)
    with _clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield staging / target.name
            for file in sorted(staging.iterdir(), key=lambda file: file.name == target.name):
                file.replace(target.parent / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _clear_write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{target}: no space left on the device; nothing was written") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                f"{target}: cannot be written ({error.strerror}); nothing was written"
            ) from error
        raise


def nearest_folder(target: Path) -> Path:
    """The closest thing above `target` that exists."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent
