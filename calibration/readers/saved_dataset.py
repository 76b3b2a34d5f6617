"""Folders that `save_to_disk` of Hugging Face datasets writes. Only this module needs the datasets package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from calibration.audio import EmbeddedAudio
from calibration.errors import InputError, UnsupportedError
from calibration.readers.text_file import named_columns
from calibration.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from calibration.records import BadRecord, ReadSettings, RecordSource

SAVED_DICT = "dataset_dict.json"
SAVED = ("state.json", "dataset_info.json")
INSTALL = "pip install 'sarsteer-export[datasets]'"


def is_saved(folder: Path) -> bool:
    """Whether a folder is a saved data set of one split."""
    return all((folder / name).is_file() for name in SAVED)


def saved_splits(folder: Path) -> list[str]:
    """The splits of a saved `DatasetDict`. Raises `InputError`."""
    try:
        splits = json.loads((folder / SAVED_DICT).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SAVED_DICT}: does not name the splits ({error})") from None
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise InputError(f"{folder / SAVED_DICT}: splits is {splits!r}; expected names")
    return splits


def read_saved_dataset(folder: Path, settings: ReadSettings) -> RecordSource:
    """The rows of a saved data set. Audio stays on disk until it is asked for, and is decoded by soundfile.

    Raises `UnsupportedError` without the datasets package, `InputError` when the folder is damaged or a column
    is missing.
    """
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"{folder}: a data set saved by Hugging Face datasets needs that package; {INSTALL}"
        ) from None
    try:
        rows: Any = datasets.load_from_disk(str(folder), keep_in_memory=False)
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Audio):
                rows = rows.cast_column(name, datasets.Audio(decode=False))
    except Exception as error:  # a damaged folder surfaces as almost any exception of pyarrow and datasets
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
    found = named_columns(folder, (), settings)
    check_columns(folder, rows.column_names, found, settings)
    return named_columns(folder, _records(folder, rows, found), settings)


def check_columns(folder: Path, columns: list[str], found: RecordSource, settings: ReadSettings) -> None:
    """Raise `InputError` when a data set does not have the columns that are needed."""
    wanted = [(found.audio, "--audio-column")] if settings.require_audio else []
    if settings.prompt is None:
        wanted.append((found.text, "--text-column, or give the text with --prompt"))
    if settings.transcript_column is not None:
        wanted.append((found.transcript, "--transcript-column"))
    for column, remedy in wanted:
        if column not in columns:
            named = ", ".join(map(repr, columns))
            raise InputError(f"{folder}: has no column {column!r}, but {named}; name it with {remedy}")


def _records(folder: Path, rows: Any, found: RecordSource) -> Iterator[Record | BadRecord]:
    columns = [name for name in (found.text, found.transcript) if name in rows.column_names]
    spoken = found.audio in rows.column_names
    by_path = spoken and getattr(rows.features[found.audio], "dtype", None) in ("string", "large_string")
    light = rows.select_columns([*columns, found.audio] if by_path else columns)
    for number in range(len(rows)):
        where = f"{folder}, row {number}"
        fields = dict(light[number]) if light.column_names else {}
        if spoken and not by_path:
            fields[found.audio] = _embedded(folder, where, rows, number, found.audio)
        yield Record(where, fields)


def _embedded(folder: Path, where: str, rows: Any, number: int, column: str) -> EmbeddedAudio:
    return EmbeddedAudio(where, lambda: encoded(where, folder, rows[number][column]))


def encoded(where: str, folder: Path, value: Any) -> bytes:
    """The bytes of an audio file as datasets stores it: itself, or a path to it. Raises `InputError`."""
    content = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if isinstance(content, bytes):
        return content
    if content is None and isinstance(path, str) and path:
        try:
            return (folder / path).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(f"audio {where}: {folder / path} cannot be read ({error})") from None
    raise InputError(f"audio {where}: holds neither the bytes of an audio file nor a path to one")
