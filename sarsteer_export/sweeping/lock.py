"""One sweep at a time in a folder, by a lock of the operating system: it ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = "lock"
"""The locked file, in the folder; it holds the number of the process and says nothing when nobody has locked it."""


UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What filesystems without locks say; a sweep goes on without."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made; it is removed again at the end when it then holds nothing.

    Raises `InputError` when another process, or another part of this one, holds it.
    """
    descriptor = _locked(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # somebody else has begun in it, or removed it
            if list(folder.iterdir()) == [folder / LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise `InputError` when somebody holds `folder` now."""
    if (folder / LOCK).is_file():
        os.close(_locked(folder))


def _locked(folder: Path) -> int:
    """A descriptor of the locked file."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # who held it has just removed the folder
        try:
            _lock(descriptor, folder)
            if _is_at(descriptor, folder / LOCK):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed before it was locked


def _lock(descriptor: int, folder: Path) -> None:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        return
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        process = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        raise InputError(
            f"{folder}: another sweep is at work on it (process {process}); wait for it, or name another output"
        ) from None
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
