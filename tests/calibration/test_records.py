"""Bad records: all of them are named at once, or skipped and counted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from calibration.errors import BadRecordsError, InputError
from calibration.records import OnError, ReadSettings, SpokenRequest, check_audio_file
from calibration.requests import check_audio_files, read_request_set, read_requests
from tests.calibration.readers.conftest import write_tone

SKIP = ReadSettings(on_error=OnError.SKIP)


def write(folder: Path, *records: object) -> Path:
    path = folder / "r.jsonl"
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return path


def test_every_bad_record_is_named_up_to_ten(tmp_path: Path) -> None:
    path = write(tmp_path, {"audio": "a.wav", "text": "x"}, *[{"audio": "a.wav"}] * 11, "nonsense")
    with pytest.raises(BadRecordsError) as error:
        read_requests(path)
    head, *lines = str(error.value).split("\n  ")
    assert head == f"{path}: 12 of 13 records are bad; mend them, or leave them out with --on-error skip:"
    wanted = [f"{path}, line {line}: text is None; expected a non-empty string" for line in range(2, 12)]
    assert lines == [*wanted, "and 2 more"]


def test_skipping_leaves_the_others_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"audio": f"{number}.wav", "text": "x"} for number in range(3)]
    path = write(tmp_path, good[0], "nonsense", good[1], {}, 3, [], good[2])
    with caplog.at_level(logging.WARNING, logger="calibration"):
        found = read_request_set(path, settings=SKIP)
    assert [request.audio for request in found.requests] == [
        tmp_path / f"{number}.wav" for number in range(3)
    ]
    assert [bad.where for bad in found.skipped] == [f"{path}, line {line}" for line in (2, 4, 5, 6)]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{path}: 4 of 7 records skipped: {path}, line 2: not JSON")
    assert message.endswith("and 1 more")
    assert "\n" not in message


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"every one of 2 records is bad; nothing is left:\n  .*line 1.*\n  .*line 2"
    ):
        read_requests(write(tmp_path, {}, 3), settings=SKIP)


def test_what_is_skipped_does_not_depend_on_the_limit_and_the_limit_counts_good_ones(tmp_path: Path) -> None:
    records: list[object] = [
        {"audio": f"{number}.wav", "text": "x"} if number % 2 else {} for number in range(20)
    ]
    found = read_request_set(write(tmp_path, *records), limit=4, seed=1, settings=SKIP)
    assert (len(found.requests), len(found.skipped)) == (4, 10)


def test_clips_that_fail_a_check_are_refused_together_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tone(tmp_path / "good.wav", 0)
    (tmp_path / "bad.wav").write_bytes(b"nonsense")
    names = ("good.wav", "none.wav", "bad.wav")
    path = write(tmp_path, *({"audio": name, "text": "x"} for name in names))
    found = read_request_set(path)
    message = (
        f"2 of 3 records are bad.*\n  {re.escape(str(path))}, line 2: audio .*none.wav: no such file\n"
        "  .*line 3: audio .*bad.wav: not a readable audio file"
    )
    with pytest.raises(InputError, match=message):
        found.checked(check_audio_file, OnError.STOP)
    with pytest.raises(InputError, match=message):
        check_audio_files(found.requests)
    with caplog.at_level(logging.WARNING, logger="calibration"):
        left = found.checked(check_audio_file, OnError.SKIP)
    assert left.requests == found.requests[:1]
    assert (left.summary()["count"], left.summary()["skipped"]) == (1, 2)
    assert caplog.text.count("2 of 3 records skipped") == 1
    one_bad = read_request_set(
        write(tmp_path, {"audio": "good.wav", "text": "x"}, {"audio": "bad.wav", "text": "x"})
    )
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))}, line 2: audio .*bad.wav: not a readable"
    ):
        one_bad.checked(check_audio_file, OnError.STOP)


def test_text_alone_is_for_models_that_take_it(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "x"}, {"text": "y", "audio": None})
    with pytest.raises(InputError, match=r"2 of 2 records are bad.*\n.*audio is None"):
        read_requests(path)
    found = read_requests(path, settings=ReadSettings(require_audio=False))
    assert found == (SpokenRequest(None, "x"), SpokenRequest(None, "y"))
    check_audio_files(found)
    assert str(found[0]) == f"{path}, line 1: text alone"
    with pytest.raises(InputError, match=r"line 1: is text alone; expected audio"):
        found[0].clip()


@pytest.mark.parametrize("name", ["prompt", "audio_column", "text_column", "transcript_column"])
@pytest.mark.parametrize("value", ["", "\0", "\ud800"])
def test_settings_that_are_no_text_are_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match="expected a text that is not empty"):
        ReadSettings(**{name: value})  # type: ignore[arg-type]


def test_the_prompt_fills_in_and_does_not_replace(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"audio": "a.wav", "text": "own"}, {"audio": "b.wav"}, {"audio": "c.wav", "text": ""}
    )
    with pytest.raises(InputError, match="line 3: text is ''"):
        read_requests(path, settings=ReadSettings(prompt="Answer."))
    path = write(tmp_path, {"audio": "a.wav", "text": "own"}, {"audio": "b.wav"})
    found = read_requests(path, settings=ReadSettings(prompt="Answer."))
    assert [request.text for request in found] == ["own", "Answer."]
