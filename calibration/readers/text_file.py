"""Text files of records, and the names of the columns in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.records import RecordSource

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from calibration.records import BadRecord, ReadSettings, Record


def read_text(source: Path) -> str:
    """A UTF-8 file, line ends as they are, without its byte order mark. Raises `InputError`."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{source}: no such file or folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read as UTF-8 text ({error})") from error


def named_columns(
    folder: Path,
    records: Iterable[Record | BadRecord],
    settings: ReadSettings,
    *,
    audio: str = "audio",
    prompt: str | None = None,
) -> RecordSource:
    """Records whose columns have the names that are documented, or those that were given."""
    return RecordSource(
        records=records,
        folder=folder,
        audio=settings.audio_column or audio,
        text=settings.text_column or "text",
        transcript=settings.transcript_column or "transcript",
        prompt=prompt,
    )
