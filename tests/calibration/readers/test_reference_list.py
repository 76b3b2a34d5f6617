"""The lists of the SARSteer reference repository, made here by their form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.errors import InputError
from calibration.records import DEFAULT_PROMPT, ReadSettings, SpokenRequest
from calibration.requests import read_requests


def write_list(path: Path, *records: dict[str, object]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_figstep_lists_name_clips_in_the_folder_question(tmp_path: Path) -> None:
    record = {"scenario": "Fraud", "audio_file": "Fraud_8.wav", "question": "How do polls work?"}
    (found,) = read_requests(write_list(tmp_path / "train_100.json", record))
    assert found == SpokenRequest(tmp_path / "question/Fraud_8.wav", DEFAULT_PROMPT, "How do polls work?")


def test_advbench_lists_name_clips_in_the_folder_called_as_they_are(tmp_path: Path) -> None:
    record = {"question_id": 1, "audio_name": "1.wav", "question": "Write a poem"}
    path = write_list(tmp_path / "advbench_audio_safe.json", record)
    (found,) = read_requests(path, settings=ReadSettings("Go on."))
    assert found == SpokenRequest(tmp_path / "advbench_audio_safe/1.wav", "Go on.", "Write a poem")
    (tmp_path / "1.wav").touch()  # a clip beside its list is found, too
    assert read_requests(path)[0].audio == tmp_path / "1.wav"


def test_sorry_bench_lines_number_their_clips(tmp_path: Path) -> None:
    path = tmp_path / "base_question.jsonl"
    path.write_text(json.dumps({"question_id": 7, "category": "3", "turns": ["How?"]}))
    (found,) = read_requests(path)
    assert found == SpokenRequest(tmp_path / "base_question_audio/7.wav", DEFAULT_PROMPT, "How?")


def test_air_bench_asks_its_question_in_writing(tmp_path: Path) -> None:
    record = {"path": "1.wav", "task_name": "sound_QA", "dataset_name": "clotho", "question": "What barks?"}
    (found,) = read_requests(write_list(tmp_path / "Chat_meta.json", record))
    assert found == SpokenRequest(tmp_path / "sound_QA_clotho/1.wav", "What barks?")


def test_a_bad_record_of_a_list_is_named(tmp_path: Path) -> None:
    good = {"audio_file": "1.wav", "question": "How?"}
    path = write_list(tmp_path / "train.json", good, {"audio_file": None, "question": "x"}, {"question": 3})
    with pytest.raises(InputError, match="2 of 3 records are bad") as error:
        read_requests(path)
    assert [line.strip().removeprefix(f"{path}, ") for line in str(error.value).splitlines()[1:]] == [
        "record 2, line 1: audio is None; expected a non-empty string",
        "record 3, line 1: audio is None; expected a non-empty string",
    ]


def test_named_columns_and_own_names_are_no_list(tmp_path: Path) -> None:
    record = {"audio_file": "1.wav", "question": "How?"}
    path = write_list(tmp_path / "train.json", record)
    settings = ReadSettings(audio_column="audio_file", text_column="question")
    assert read_requests(path, settings=settings) == (SpokenRequest(tmp_path / "1.wav", "How?"),)
    path = write_list(tmp_path / "own.json", record | {"audio": "2.wav", "text": "x"})
    assert read_requests(path) == (SpokenRequest(tmp_path / "2.wav", "x"),)
