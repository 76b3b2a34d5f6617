"""Copies of external data: real files, whole, with room for them, and a graph that refers to them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest

from calibration.errors import InputError
from graph_passes import external_copy
from graph_passes.external_copy import CHUNK_BYTES, FICLONE, STAGE, copied_locations, copy_files, relocate
from graph_passes.onnx_file import external_files
from tests.graph_passes.test_onnx_file import AT, model_with

Usage = namedtuple("Usage", "total used free")
CONTENT = bytes(range(256)) * 8192
"""2 MiB."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    return tmp_path / "weights.bin"


@pytest.fixture(autouse=True)
def _no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the filesystem of the tests can; `clones` gives it back."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch, _no_clones: None) -> list[int]:
    """A filesystem that clones: the ioctl copies, and the requests it was given are listed."""
    asked: list[int] = []

    def ioctl(target: int, request: int, source: int) -> int:
        asked.append(request)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


def test_a_copy_beside_the_original_is_named_after_the_graph() -> None:
    assert copied_locations(model_with(w=AT), "steered.onnx") == {"weights.bin": "steered.onnx.data"}
    several = model_with(a=AT, b=AT | {"location": "sub/a.bin"}, c=AT | {"location": "./weights.bin"})
    assert copied_locations(several, "s.onnx") == {
        "sub/a.bin": "s.onnx.data.0",
        "weights.bin": "s.onnx.data.1",
        "./weights.bin": "s.onnx.data.1",
    }
    assert copied_locations(model_with(), "s.onnx") == {}


def test_a_relocated_graph_reads_the_same_bytes_of_another_file() -> None:
    model = model_with(w=AT)
    relocate(model, {"weights.bin": "copy"})
    assert model == model_with(w=AT | {"location": "copy"})
    assert [file.location for file in external_files(model)] == ["copy"]


def test_a_copy_is_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    linked = tmp_path / "link"
    linked.symlink_to(source)
    copy_files({source: tmp_path / "new" / "a", linked: tmp_path / "new" / "b"})
    for copy in (tmp_path / "new" / "a", tmp_path / "new" / "b"):
        found = copy.lstat()
        assert stat.S_ISREG(found.st_mode)
        assert found.st_nlink == 1
        assert found.st_ino != source.stat().st_ino
        assert copy.read_bytes() == CONTENT


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o444])
@pytest.mark.parametrize("cloning", [True, False])
def test_a_copy_has_the_mode_of_a_new_file(
    mode: int, cloning: bool, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if cloning:
        request.getfixturevalue("clones")
    source.chmod(mode)
    (tmp_path / "new").touch()
    copy_files({source: tmp_path / "copy"})
    assert (tmp_path / "copy").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_where_the_filesystem_clones_nothing_is_streamed_and_no_room_is_asked_for(
    source: Path, tmp_path: Path, clones: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    reports: list[tuple[str, int, int]] = []
    copy_files({source: tmp_path / "copy"}, progress=lambda *report: reports.append(report))
    assert clones == [FICLONE]
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert reports == []


@pytest.mark.parametrize("reason", sorted(external_copy.NO_CLONE))
def test_where_it_cannot_clone_the_bytes_are_streamed(
    reason: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    copy_files({source: tmp_path / "copy"})
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_failure_of_the_disk_is_not_taken_for_one_to_clone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match="Input/output"):
        copy_files({source: tmp_path / "copy"})


def test_progress_counts_mebibytes_over_all_files_and_ends_once(tmp_path: Path) -> None:
    sizes = {"a": 2 * CHUNK_BYTES + 5, "b": 0, "c": 3}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    reports: list[tuple[str, int, int]] = []
    copies = {tmp_path / name: tmp_path / f"{name}.copy" for name in sizes}
    copy_files(copies, progress=lambda *report: reports.append(report))
    assert reports == [(STAGE, 16, 33), (STAGE, 32, 33), (STAGE, 32, 33), (STAGE, 33, 33)]
    assert [(tmp_path / f"{name}.copy").stat().st_size for name in sizes] == list(sizes.values())


@pytest.mark.parametrize(("free", "fits"), [(len(CONTENT) + 100, True), (len(CONTENT) + 99, False)])
def test_too_little_room_is_seen_before_a_byte_is_written(
    free: int, fits: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free))
    if fits:
        copy_files({source: tmp_path / "copy"}, room_for=100)
        return
    with pytest.raises(InputError, match=rf"no space left .* needs {len(CONTENT) + 100} bytes.* {free} free"):
        copy_files({source: tmp_path / "copy"}, room_for=100)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.bin"]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_meanwhile_is_seen(
    change: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize(_: Path) -> Usage:
        os.truncate(source, len(CONTENT) + change)
        return Usage(1 << 40, 0, 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", resize)
    with pytest.raises(
        InputError, match=f"had {len(CONTENT)} bytes and, once copied, {len(CONTENT) + change}"
    ):
        copy_files({source: tmp_path / "copy"})


def test_a_copy_replaces_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        copy_files({source: tmp_path / "copy"})
    assert (tmp_path / "copy").read_bytes() == b"precious"
