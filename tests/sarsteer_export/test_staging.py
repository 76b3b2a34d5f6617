"""Outputs are whole or absent; what stood there before stays until its successor is complete."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from calibration.errors import InputError, ParityError
from sarsteer_export.staging import check_output, foreign_file, out_of_room, staged_directory, staged_file
from tests.sarsteer_export.command_line import listing


def write(
    kind: str, path: Path, text: str, *, overwrite: bool = False, error: Exception | None = None
) -> None:
    """Write text through a staged file or directory, failing halfway when told to."""
    context: AbstractContextManager[Path] = (staged_file if kind == "file" else staged_directory)(
        path, overwrite=overwrite
    )
    with context as staged:
        target = staged if kind == "file" else staged / CONTENT
        target.write_text(text[:1], encoding="utf-8")
        if error is not None:
            raise error
        target.write_text(text, encoding="utf-8")


def read(kind: str, path: Path) -> str:
    return (path if kind == "file" else path / CONTENT).read_text(encoding="utf-8")


CONTENT = "audio_encoder.onnx"
"""A folder that holds nothing but files of an export is ours to replace."""
KINDS = pytest.mark.parametrize("kind", ["file", "directory"])


@KINDS
def test_an_output_appears_with_its_parents_and_nothing_beside_it(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "output"
    write(kind, target, "whole")
    assert read(kind, target) == "whole"
    assert list(target.parent.iterdir()) == [target]


@KINDS
def test_nothing_is_at_the_target_while_it_is_written(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    with (staged_file if kind == "file" else staged_directory)(target) as staged:
        assert not target.exists()
        (staged if kind == "file" else staged / CONTENT).write_text("x", encoding="utf-8")
    assert target.exists()


@KINDS
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), ParityError("x"), SystemExit(1)])
def test_after_a_failure_nothing_is_left_not_even_folders_made_for_it(
    kind: str, error: Exception, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    before = listing(tmp_path)
    with pytest.raises(type(error)):
        write(kind, tmp_path / "a" / "b" / "c" / "output", "whole", error=error)
    assert listing(tmp_path) == before


@KINDS
def test_what_exists_is_replaced_only_when_told_to(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    write(kind, target, "old")
    with pytest.raises(InputError, match="exists; use --overwrite"):
        write(kind, target, "new")
    assert read(kind, target) == "old"
    write(kind, target, "new", overwrite=True)
    assert read(kind, target) == "new"
    assert list(tmp_path.iterdir()) == [target]


@KINDS
def test_what_exists_survives_a_failure(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    write(kind, target, "old")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="halfway"):
        write(kind, target, "new", overwrite=True, error=ValueError("halfway"))
    assert listing(tmp_path) == before


def test_what_exists_is_put_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "output"
    write("directory", target, "old")
    before, replace = listing(tmp_path), Path.replace

    def fail_for_the_new_one(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        write("directory", target, "new", overwrite=True)
    assert listing(tmp_path) == before


def test_an_old_directory_is_replaced_whole_not_merged(tmp_path: Path) -> None:
    target = tmp_path / "output"
    write("directory", target, "old")
    (target / "embed_tokens.onnx").write_text("x", encoding="utf-8")
    write("directory", target, "new", overwrite=True)
    assert [file.name for file in target.iterdir()] == [CONTENT]


def test_files_written_beside_a_staged_file_come_along(tmp_path: Path) -> None:
    target = tmp_path / "graph.onnx"
    with staged_file(target) as staged:
        staged.write_text("graph", encoding="utf-8")
        staged.with_name("weights").write_text("data", encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["graph.onnx", "weights"]


def test_a_staged_file_appears_last_when_what_it_needs_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, order = Path.replace, []

    def note(path: Path, to: Path) -> Path:
        order.append(to.name)
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", note)
    with staged_file(tmp_path / "graph") as staged:
        for name in ("a weights", "graph", "z weights"):
            staged.with_name(name).write_text(name, encoding="utf-8")
    assert sorted(order[:-1]) == ["a weights", "z weights"]
    assert order[-1] == "graph"


def test_a_file_cannot_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    with pytest.raises(InputError, match="is a directory"), staged_file(tmp_path / "output", overwrite=True):
        pass


@pytest.mark.parametrize("below", ["file/output", "file/a/b/output"])
def test_an_output_under_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"file is not a directory"):
        check_output(tmp_path / below, overwrite=False)


@KINDS
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota"),
        (OSError(errno.EFBIG, "File too large"), "largest size allowed"),
        (Exception("No space left on device (os error 28)"), "no space left on the device"),
        (OSError("problem writing element 1024 to file"), "could not be written whole"),
        (OSError("Not enough free space to write 4096 bytes"), "could not be written whole"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written (Permission denied)"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only file system)"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_what_stops_a_write_is_said_in_one_message(
    kind: str, error: Exception, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        write(kind, tmp_path / "output", "whole", error=error)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'output'}: ")
    assert words in message
    assert message.endswith("; nothing was written")
    assert listing(tmp_path) == {}


def test_a_file_that_may_not_be_read_is_not_called_the_output(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/clip.flac")
    with pytest.raises(PermissionError):
        write("file", tmp_path / "output", "whole", error=error)
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "output"))
    with pytest.raises(InputError, match="cannot be written"):
        write("file", tmp_path / "output", "whole", error=inside)


def test_a_folder_that_may_not_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*, prefix: str, dir: Path) -> str:  # noqa: A002 - the name is mkdtemp's
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / f"{prefix}x"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=r"output: cannot be written \(Permission denied\)"):
        write("directory", tmp_path / "new" / "output", "whole")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "x"), ValueError("x"), Exception("x (os error 2)"), OSError("x")]
)
def test_other_errors_are_not_a_lack_of_room(error: Exception) -> None:
    assert out_of_room(error) is None


def test_a_folder_with_other_peoples_files_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "project"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work", encoding="utf-8")
    with (
        pytest.raises(InputError, match=r"holds thesis\.tex, .*; it is not replaced"),
        staged_directory(target, overwrite=True),
    ):
        raise AssertionError("the block must not be entered")
    assert [file.name for file in target.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "my web app"}',
        '{"format": "sarsteer-bundle", "files": {"plan": {}}}',
        '{"format": "sarsteer-bundle"}',
        "[]",
        "no JSON",
    ],
)
def test_a_manifest_alone_does_not_make_a_folder_ours(manifest: str, tmp_path: Path) -> None:
    for name, text in (("manifest.json", manifest), ("plan", "ours"), ("thesis.tex", "years of work")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"holds (manifest.json|plan|thesis.tex), .* it is not replaced"):
        check_output(tmp_path, overwrite=True)
    assert foreign_file(tmp_path) in ("manifest.json", "plan", "thesis.tex")


def test_a_bundle_is_ours_while_it_holds_what_its_manifest_lists(tmp_path: Path) -> None:
    listed = '{"format": "sarsteer-bundle", "files": {"onnx/decoder.onnx": {}}}'
    (tmp_path / "manifest.json").write_text(listed, encoding="utf-8")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "decoder.onnx").write_text("graph", encoding="utf-8")
    assert foreign_file(tmp_path) is None
    (tmp_path / "onnx" / "notes.txt").write_text("mine", encoding="utf-8")
    assert foreign_file(tmp_path) == "onnx/notes.txt"


def test_an_empty_folder_is_replaced_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    write("directory", tmp_path / "output", "new", overwrite=True)
    assert read("directory", tmp_path / "output") == "new"


def test_files_in_folders_beside_a_staged_file_come_along_into_folders_that_exist(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "other").write_text("stays", encoding="utf-8")
    with staged_file(tmp_path / "graph") as staged:
        (staged.parent / "weights").mkdir()
        (staged.parent / "weights" / "data").write_text("comes", encoding="utf-8")
        staged.write_text("graph", encoding="utf-8")
    assert sorted(file.name for file in (tmp_path / "weights").iterdir()) == ["data", "other"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["graph", "weights"]


@pytest.mark.parametrize("failing", ["data", "other", "graph"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_files_beside_a_staged_file_come_along_all_or_none(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "graph"):
        (tmp_path / name).write_text(f"old {name}", encoding="utf-8")
    before, replace = listing(tmp_path), Path.replace

    def fail(path: Path, to: Path) -> Path:
        if to == tmp_path / failing or to == tmp_path / "new" / failing:
            monkeypatch.setattr(Path, "replace", replace)
            raise error
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)):
        write_three(tmp_path / "graph", "data", "new/other")
    assert listing(tmp_path) == before


def write_three(graph: Path, *others: str) -> None:
    """Write a staged file and others beside it."""
    with staged_file(graph, overwrite=True) as staged:
        for file in (*(staged.parent / name for name in others), staged):
            file.parent.mkdir(exist_ok=True)
            file.write_text("new", encoding="utf-8")


def test_a_directory_in_the_way_of_a_file_beside_a_staged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine", encoding="utf-8")
    before = listing(tmp_path)
    with pytest.raises(InputError, match=r"data: is a directory; .* remove it yourself"):
        write_three(tmp_path / "graph", "data")
    assert listing(tmp_path) == before
