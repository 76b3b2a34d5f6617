"""Parquet files, as the Hugging Face hub holds them: shards of one or several splits."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from calibration.audio import EmbeddedAudio
from calibration.errors import InputError, UnsupportedError
from calibration.readers.saved_dataset import INSTALL, check_columns, encoded
from calibration.readers.text_file import named_columns
from calibration.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from calibration.records import BadRecord, ReadSettings, RecordSource

SHARD = re.compile(r"(?P<split>\w+?)-\d+-of-\d+(-[0-9a-f]+)?")
"""The name of one shard of a split: `train-00000-of-00002`."""


def parquet_shards(folder: Path) -> dict[str, list[Path]]:
    """The parquet files in a folder and in those inside it, by split: by the names of shards, or of whole files."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        shard = SHARD.fullmatch(file.stem)
        splits.setdefault(file.stem if shard is None else shard["split"], []).append(file)
    return splits


def read_parquet(source: Path, shards: Sequence[Path], settings: ReadSettings) -> RecordSource:
    """The rows of parquet files. Of the audio one row group at a time is in memory, and only when asked for.

    Raises `UnsupportedError` without pyarrow, `InputError` for a damaged file or a missing column.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(f"{source}: parquet files need the package pyarrow; {INSTALL}") from None
    folder = source if source.is_dir() else source.parent
    found = named_columns(folder, (), settings)
    for shard in shards:
        try:
            columns = pyarrow.parquet.read_schema(shard).names
        except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file is one of them
            raise InputError(f"{shard}: not a parquet file ({error})") from None
        check_columns(shard, columns, found, settings)
    return named_columns(folder, _records(folder, shards, found), settings)


def _records(folder: Path, shards: Sequence[Path], found: RecordSource) -> Iterator[Record | BadRecord]:
    import pyarrow

    groups = _RowGroups(found.audio)
    for shard in shards:
        file = _opened(shard)
        schema = file.schema_arrow
        kind = schema.field(found.audio).type if found.audio in schema.names else None
        by_path = kind is not None and (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
        columns = [name for name in (found.text, found.transcript) if name in schema.names]
        number = 0
        try:
            for batch in file.iter_batches(columns=[*columns, found.audio] if by_path else columns):
                for fields in batch.to_pylist():
                    where = f"{shard}, row {number}"
                    if kind is not None and not by_path:
                        fields[found.audio] = groups.audio(where, folder, shard, number)
                    yield Record(where, fields)
                    number += 1
        except (OSError, ValueError) as error:
            raise InputError(f"{shard}: cannot be read ({error})") from None


class _RowGroups:
    """The audio column of parquet files, read by row groups; the last one read is kept."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._group = lru_cache(maxsize=1)(self._read)
        self._starts = lru_cache(maxsize=None)(self._first_rows)

    def audio(self, where: str, folder: Path, shard: Path, row: int) -> EmbeddedAudio:
        """The clip in a row of a file."""

        def read() -> bytes:
            try:
                starts = self._starts(shard)
                group = bisect_right(starts, row) - 1
                value = self._group(shard, group)[row - starts[group]].as_py()
            except (OSError, ValueError, LookupError) as error:
                raise InputError(f"audio {where}: cannot be read ({error})") from None
            return encoded(where, folder, value)

        return EmbeddedAudio(where, read)

    def _first_rows(self, shard: Path) -> list[int]:
        metadata = _opened(shard).metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return [0, *accumulate(sizes)][:-1]

    def _read(self, shard: Path, group: int) -> Any:
        return _opened(shard).read_row_group(group, columns=[self._column]).column(self._column)


def _opened(shard: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(shard)
