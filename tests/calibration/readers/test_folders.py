"""Folders of audio, with and without metadata, and what a path may name in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from calibration.errors import InputError
from calibration.records import DEFAULT_PROMPT, ReadSettings, SpokenRequest
from calibration.requests import read_requests


@pytest.fixture
def folder(tmp_path: Path, clips: list[Path]) -> Path:
    (tmp_path / "b").mkdir()
    for name, clip in zip(("c.FLAC", "a.flac", "b/a.flac"), clips, strict=False):
        shutil.copy(clip, tmp_path / name)
    return tmp_path


def test_a_folder_of_audio_is_read_by_name_with_what_lies_beside_the_clips(folder: Path) -> None:
    (folder / "a.txt").write_text("\ufeffwhat is\nsaid\n", encoding="utf-8")
    (folder / "c.txt").write_text(" \n")
    (folder / "notes.pdf").touch()
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "a.flac", folder / ".hidden" / "z.flac")
    assert read_requests(folder) == (
        SpokenRequest(folder / "a.flac", DEFAULT_PROMPT, "what is said"),
        SpokenRequest(folder / "b" / "a.flac", DEFAULT_PROMPT),
        SpokenRequest(folder / "c.FLAC", DEFAULT_PROMPT),
    )
    given = read_requests(folder, settings=ReadSettings("Answer."))
    assert {request.text for request in given} == {"Answer."}
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a\.txt: cannot be read as UTF-8 text"):
        read_requests(folder)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_the_clips(folder: Path, kind: str) -> None:
    records = [
        {"file_name": "b/a.flac", "text": "x", "transcription": "said"},
        {"file_name": "c.FLAC", "text": "y"},
    ]
    if kind == "csv":
        content = "file_name,text,transcription\nb/a.flac,x,said\nc.FLAC,y,\n"
    else:
        content = "\n".join(map(json.dumps, records))
    (folder / f"metadata.{kind}").write_text(content)
    settings = ReadSettings(transcript_column="transcription")
    assert read_requests(folder, settings=settings) == (
        SpokenRequest(folder / "b" / "a.flac", "x", "said"),
        SpokenRequest(folder / "c.FLAC", "y"),
    )


def test_splits_are_named_behind_the_folder(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "metadata.csv").write_text(f"file_name,text\n{split}.flac,x\n")
    assert read_requests(f"{folder}#train") == (SpokenRequest(folder / "train" / "train.flac", "x"),)
    assert read_requests(folder / "test") == (SpokenRequest(folder / "test" / "test.flac", "x"),)
    with pytest.raises(InputError, match=r"holds the splits test, train; name one, as in .*#test"):
        read_requests(folder)
    with pytest.raises(InputError, match=r"holds no split 'dev'; there are: b, test, train"):
        read_requests(f"{folder}#dev")
    assert [request.audio for request in read_requests(f"{folder}#b")] == [folder / "b" / "a.flac"]


def test_a_hash_that_is_part_of_a_name_stays_one(folder: Path) -> None:
    named = (folder / "b").rename(folder / "take#2")
    assert [request.audio for request in read_requests(named)] == [named / "a.flac"]
    for wrong in (f"{folder}/a.flac#x", f"{folder}#", f"{folder}/none#x"):
        with pytest.raises(InputError, match=r"is no folder with a split|holds no split"):
            read_requests(wrong)


def test_a_folder_with_nothing_to_read_says_what_could_be(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no data that can be read; expected audio files, metadata\.csv"
    ):
        read_requests(tmp_path)
    with pytest.raises(InputError, match=r"none: no such file or folder"):
        read_requests(tmp_path / "none")
