"""Which reader a path is for: told by what lies there, never by trying one after another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.readers.audio_folder import METADATA, audio_files, read_audio_folder, read_metadata
from calibration.readers.json_records import read_json_lines, read_json_list
from calibration.readers.parquet import parquet_shards, read_parquet
from calibration.readers.saved_dataset import SAVED_DICT, is_saved, read_saved_dataset, saved_splits
from calibration.readers.table import DELIMITERS, read_table

if TYPE_CHECKING:
    from calibration.records import ReadSettings, RecordSource


def find_records(path: str | Path, settings: ReadSettings) -> RecordSource:
    """The records at a path, which may end in `#SPLIT`. Raises `InputError` where there is nothing to read."""
    source, split = Path(path), None
    if not source.exists() and "#" in source.name:
        name, _, split = source.name.rpartition("#")
        source = source.with_name(name) if name else source.parent
        if not split or not source.is_dir():
            raise InputError(f"{path}: {source} is no folder with a split {split!r}; expected FOLDER#SPLIT")
    if source.is_dir():
        return _folder(source, split, settings)
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(source, [source], settings)
    if suffix in DELIMITERS:
        return read_table(source, settings)
    return read_json_list(source, settings) if suffix == ".json" else read_json_lines(source, settings)


def _folder(folder: Path, split: str | None, settings: ReadSettings) -> RecordSource:
    if (folder / SAVED_DICT).is_file():
        splits = saved_splits(folder)
        return read_saved_dataset(folder / _chosen(folder, split, splits), settings)
    if split is None and is_saved(folder):
        return read_saved_dataset(folder, settings)
    if shards := parquet_shards(folder):
        name = (
            _chosen(folder, split, list(shards))
            if split is not None or len(shards) > 1
            else next(iter(shards))
        )
        return read_parquet(folder, shards[name], settings)
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    if split is not None:
        return _folder(folder / _chosen(folder, split, [path.name for path in inner]), None, settings)
    if metadata := next((folder / name for name in METADATA if (folder / name).is_file()), None):
        return read_metadata(metadata, settings)
    if splits := [path.name for path in inner if any((path / name).is_file() for name in METADATA)]:
        _chosen(folder, None, splits)
    if files := audio_files(folder):
        return read_audio_folder(folder, files)
    raise InputError(
        f"{folder}: holds no data that can be read; expected audio files, metadata.csv or metadata.jsonl, parquet "
        "files, or what `save_to_disk` of Hugging Face datasets writes"
    )


def _chosen(folder: Path, split: str | None, splits: list[str]) -> str:
    named = ", ".join(splits) or "none"
    if split is None:
        if len(splits) == 1:
            return splits[0]
        raise InputError(
            f"{folder}: holds the splits {named}; name one, as in {folder}#{(splits or ['train'])[0]}"
        )
    if split not in splits:
        raise InputError(f"{folder}: holds no split {split!r}; there are: {named}")
    return split
