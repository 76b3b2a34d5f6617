"""Folders of audio files: plain ones, and those with a metadata file (the audiofolder layout of datasets)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.audio import AUDIO_SUFFIXES
from calibration.readers.json_records import json_objects
from calibration.readers.table import read_table
from calibration.readers.text_file import named_columns
from calibration.records import DEFAULT_PROMPT, BadRecord, Record, RecordSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from calibration.records import ReadSettings

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
SIDECAR = ".txt"


def read_metadata(metadata: Path, settings: ReadSettings) -> RecordSource:
    """The records of a metadata file, whose column `file_name` names clips beside it."""
    if metadata.suffix == ".csv":
        return read_table(metadata, settings, audio=FILE_NAME)
    return named_columns(metadata.parent, json_objects(metadata), settings, audio=FILE_NAME)


def audio_files(folder: Path) -> list[Path]:
    """Every audio file in a folder and those in it, by name; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_audio_folder(folder: Path, files: list[Path]) -> RecordSource:
    """A record for each file; what is said in `a.wav` stands in `a.txt` beside it, if that is there."""

    def records() -> Iterator[Record | BadRecord]:
        for file in files:
            transcript = None
            try:
                if (sidecar := file.with_suffix(SIDECAR)).is_file():
                    transcript = " ".join(sidecar.read_text(encoding="utf-8-sig").split()) or None
            except (OSError, UnicodeDecodeError) as error:
                yield BadRecord(str(sidecar), f"cannot be read as UTF-8 text ({error})")
            else:
                yield Record(str(file), {"audio": str(file.relative_to(folder)), "transcript": transcript})

    return RecordSource(records(), folder, "audio", "text", "transcript", prompt=DEFAULT_PROMPT)
