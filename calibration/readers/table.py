"""CSV and TSV files with a header line."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.readers.text_file import named_columns, read_text
from calibration.records import BadRecord, Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from calibration.records import ReadSettings, RecordSource

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(source: Path, settings: ReadSettings, *, audio: str = "audio") -> RecordSource:
    """The records of a table, an empty cell being no value. `audio`: what its audio column is called.

    Raises `InputError` when the header does not have the columns that are needed.
    """
    rows = _rows(source)
    header = next(rows, (1, []))[1]
    if len(set(header)) != len(header):
        raise InputError(f"{source}: its header names a column twice: {', '.join(header)}")
    found = named_columns(source.parent, _records(source, header, rows), settings, audio=audio)
    wanted = [(found.audio, "--audio-column")] if settings.require_audio else []
    if settings.prompt is None:
        wanted.append((found.text, "--text-column, or give the text with --prompt"))
    if settings.transcript_column is not None:
        wanted.append((found.transcript, "--transcript-column"))
    for column, remedy in wanted:
        if column not in header:
            named = ", ".join(map(repr, header)) or "nothing"
            raise InputError(
                f"{source}: its header has no column {column!r}, but {named}; name it with {remedy}"
            )
    return found


def _records(
    source: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]
) -> Iterator[Record | BadRecord]:
    for line, row in rows:
        where = f"{source}, line {line}"
        if len(row) != len(header):
            yield BadRecord(where, f"has {len(row)} cells; the header has {len(header)}")
        else:
            yield Record(where, {name: cell or None for name, cell in zip(header, row, strict=True)})


def _rows(source: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with the line it starts on."""
    reader = csv.reader(
        io.StringIO(read_text(source), newline=""), delimiter=DELIMITERS[source.suffix.lower()], strict=True
    )
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{source}, line {start}: cannot be read as a table ({error})") from None
