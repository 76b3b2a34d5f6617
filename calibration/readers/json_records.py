"""JSON Lines, one object a line, and JSON arrays of objects."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from calibration.readers.reference_list import reference_list
from calibration.readers.text_file import named_columns, read_text
from calibration.records import BadRecord, Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from calibration.records import ReadSettings, RecordSource

WHITESPACE = " \t\r\n"


def read_json_lines(source: Path, settings: ReadSettings) -> RecordSource:
    """The records of a JSON Lines file; empty lines are none."""
    return _columns(source, _lines(source, read_text(source)), settings)


def read_json_list(source: Path, settings: ReadSettings) -> RecordSource:
    """The records of a `.json` file: an array of objects, or JSON Lines under that name."""
    text = read_text(source)
    records = _array(source, text) if text.lstrip(WHITESPACE).startswith("[") else _lines(source, text)
    return _columns(source, records, settings)


def json_objects(source: Path) -> Iterator[Record | BadRecord]:
    """The records of a JSON Lines file, whatever their fields are called."""
    return _lines(source, read_text(source))


def _columns(source: Path, found: Iterator[Record | BadRecord], settings: ReadSettings) -> RecordSource:
    records = list(found)
    return reference_list(source, records, settings) or named_columns(source.parent, records, settings)


def _lines(source: Path, text: str) -> Iterator[Record | BadRecord]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                yield _record(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield BadRecord(where, f"not JSON ({error})")


def _array(source: Path, text: str) -> Iterator[Record | BadRecord]:
    """The elements of an array. Behind one that is not JSON nothing can be found any more: that is an error."""
    decoder = json.JSONDecoder()
    place, line, number = _skip(text, text.index("[") + 1), 1, 0
    counted = 0
    while text[place : place + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, place), place
        where = f"{source}, record {number}, line {line}"
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        yield _record(where, value)
        place = _skip(text, place)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
            if text[place : place + 1] != "]":
                continue
        if text[place : place + 1] != "]" or text[place - 1 : place] == ",":
            raise InputError(
                f"{where}: what follows it is not JSON; expected a comma or the end of the array"
            )
    if _skip(text, place + 1) != len(text):
        raise InputError(f"{source}: holds more than one JSON array; expected one, or JSON Lines")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in WHITESPACE:
        place += 1
    return place


def _record(where: str, value: Any) -> Record | BadRecord:
    if not isinstance(value, dict):
        return BadRecord(where, f"is a {type(value).__name__}; expected an object with audio and text")
    return Record(where, value)
