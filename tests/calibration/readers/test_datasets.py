"""Data sets that the datasets package itself wrote: saved ones, and parquet as on the hub."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from calibration.audio import EmbeddedAudio, load_audio
from calibration.errors import InputError, UnsupportedError
from calibration.records import ReadSettings, SpokenRequest
from calibration.requests import read_requests, requests_digest

datasets.disable_progress_bars()
ROWS = 4


@pytest.fixture(scope="module")
def rows(clips: list[Path]) -> datasets.Dataset:
    columns = {
        "audio": list(map(str, clips)),
        "text": [f"text {number}" for number in range(ROWS)],
        "transcript": ["said", None, "also said", "more"],
        "speaker": list(range(ROWS)),
    }
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(sampling_rate=8_000))


def check(found: tuple[SpokenRequest, ...], clips: list[Path], *places: str) -> None:
    """Every row is there, and its clip is the file it was made from, at the file's own rate."""
    assert [request.text for request in found] == [f"text {number}" for number in range(len(places))]
    assert [request.transcript for request in found] == ["said", None, "also said", "more"][: len(places)]
    assert [request.where for request in found] == list(places)
    for request, place, clip in zip(found, places, clips, strict=False):
        assert isinstance(request.audio, EmbeddedAudio)
        assert request.audio.name == place
        assert request.audio.read_bytes() == clip.read_bytes()
    backwards = [load_audio(request.clip(), sampling_rate=16_000) for request in reversed(found)]
    for samples, clip in zip(reversed(backwards), clips, strict=False):
        np.testing.assert_array_equal(samples, load_audio(clip, sampling_rate=16_000))
    as_files = [
        SpokenRequest(clip, one.text, one.transcript) for clip, one in zip(clips, found, strict=False)
    ]
    assert requests_digest(found) == requests_digest(as_files)


def test_a_saved_data_set_is_read_without_decoding_by_datasets(
    tmp_path: Path, rows: datasets.Dataset, clips: list[Path]
) -> None:
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    assert "torchcodec" not in sys.modules
    check(read_requests(tmp_path / "saved"), clips, *(f"{tmp_path / 'saved'}, row {n}" for n in range(ROWS)))


def test_rows_that_were_selected_are_the_rows_that_are_read(
    tmp_path: Path, rows: datasets.Dataset, clips: list[Path]
) -> None:
    rows.select([3, 1]).save_to_disk(tmp_path / "saved")
    found = read_requests(tmp_path / "saved")
    assert [request.text for request in found] == ["text 3", "text 1"]
    assert [request.clip().read_bytes() for request in found] == [clips[n].read_bytes() for n in (3, 1)]


def test_audio_saved_as_a_path_or_as_text_is_found(
    tmp_path: Path, rows: datasets.Dataset, clips: list[Path]
) -> None:
    texts = rows.remove_columns("audio")
    texts.add_column("audio", list(map(str, clips))).save_to_disk(tmp_path / "paths")
    assert [request.audio for request in read_requests(tmp_path / "paths")] == clips
    structs = pyarrow.array([{"bytes": None, "path": str(clip)} for clip in clips])
    table = pyarrow.table({"audio": structs, "text": ["x"] * ROWS})
    pyarrow.parquet.write_table(table, tmp_path / "structs.parquet")
    found = read_requests(tmp_path / "structs.parquet")
    assert [request.clip().read_bytes() for request in found] == [clip.read_bytes() for clip in clips]


def test_a_saved_dict_needs_its_split(tmp_path: Path, rows: datasets.Dataset, clips: list[Path]) -> None:
    splits = datasets.DatasetDict({"train": rows.select(range(3)), "test": rows.select([3])})
    splits.save_to_disk(tmp_path / "dict")
    wanted = [f"{tmp_path / 'dict' / 'train'}, row {number}" for number in range(3)]
    check(read_requests(f"{tmp_path / 'dict'}#train"), clips, *wanted)
    check(read_requests(tmp_path / "dict" / "train"), clips, *wanted)
    with pytest.raises(InputError, match=r"holds the splits train, test; name one, as in .*dict#train"):
        read_requests(tmp_path / "dict")
    with pytest.raises(InputError, match=r"holds no split 'dev'; there are: train, test"):
        read_requests(f"{tmp_path / 'dict'}#dev")
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    with pytest.raises(InputError, match=r"splits is \[\]; expected names"):
        read_requests(tmp_path / "dict")


def test_parquet_shards_are_read_by_row_groups_and_split(
    tmp_path: Path, rows: datasets.Dataset, clips: list[Path]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    one, two = data / "train-00000-of-00002.parquet", data / "train-00001-of-00002.parquet"
    rows.select(range(3)).to_parquet(one, batch_size=2)
    rows.select([3]).to_parquet(two)
    assert pyarrow.parquet.ParquetFile(one).metadata.num_row_groups == 2
    wanted = [f"{one}, row 0", f"{one}, row 1", f"{one}, row 2", f"{two}, row 0"]
    check(read_requests(tmp_path), clips, *wanted)
    check(read_requests(one), clips, *wanted[:3])
    shutil.copy(two, data / "test.parquet")
    check(read_requests(f"{tmp_path}#train"), clips, *wanted)
    assert [request.text for request in read_requests(f"{tmp_path}#test")] == ["text 3"]
    with pytest.raises(InputError, match="holds the splits test, train; name one"):
        read_requests(tmp_path)


def test_clips_are_not_in_memory(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.to_parquet(tmp_path / "one.parquet")
    found = read_requests(tmp_path / "one.parquet")
    (tmp_path / "one.parquet").unlink()
    with pytest.raises(InputError, match=r"audio .*one\.parquet, row 2: cannot be read"):
        found[2].clip().read_bytes()


def test_columns_are_checked_and_the_prompt_fills_in(tmp_path: Path, rows: datasets.Dataset) -> None:
    bare = rows.select_columns(["audio"]).rename_column("audio", "wav")
    bare.save_to_disk(tmp_path / "saved")
    bare.to_parquet(tmp_path / "one.parquet")
    named = ReadSettings("Answer.", audio_column="wav")
    for path in (tmp_path / "saved", tmp_path / "one.parquet"):
        with pytest.raises(InputError, match="has no column 'audio', but 'wav'; name it with --audio-column"):
            read_requests(path)
        with pytest.raises(
            InputError, match="has no column 'text', but 'wav'; name it with --text-column, or"
        ):
            read_requests(path, settings=ReadSettings(audio_column="wav"))
        found = read_requests(path, settings=named)
        assert [request.text for request in found] == ["Answer."] * ROWS
        assert all(isinstance(request.audio, EmbeddedAudio) for request in found)
        spoken = ReadSettings(audio_column="wav", text_column="wav")
        with pytest.raises(InputError, match=f"{ROWS} of {ROWS} records are bad"):
            read_requests(path, settings=spoken)


def test_rows_without_audio_are_found_when_they_are_read(tmp_path: Path) -> None:
    empty = pyarrow.array([{"bytes": None, "path": None}])
    pyarrow.parquet.write_table(pyarrow.table({"audio": empty, "text": ["x"]}), tmp_path / "a.parquet")
    (found,) = read_requests(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"audio .*a\.parquet, row 0: holds neither the bytes"):
        load_audio(found.clip(), sampling_rate=16_000)
    gone = pyarrow.array([{"bytes": None, "path": "gone.wav"}])
    pyarrow.parquet.write_table(pyarrow.table({"audio": gone, "text": ["x"]}), tmp_path / "b.parquet")
    (found,) = read_requests(tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"row 0: .*gone\.wav cannot be read"):
        load_audio(found.clip(), sampling_rate=16_000)


@pytest.mark.parametrize("damage", ["arrow", "state.json", "dataset_info.json"])
def test_a_damaged_saved_data_set_is_refused(tmp_path: Path, rows: datasets.Dataset, damage: str) -> None:
    rows.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob(f"*{damage}")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "saved"))):
        read_requests(tmp_path / "saved")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PAR1" + b"\0" * 20 + b"PAR1"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file"):
        read_requests(tmp_path / "a.parquet")


@pytest.mark.parametrize(("package", "name"), [("datasets", "saved"), ("pyarrow.parquet", "one.parquet")])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "one.parquet")
    missing: Any = None
    monkeypatch.setitem(sys.modules, package, missing)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'sarsteer-export[datasets]'")):
        read_requests(tmp_path / name)
