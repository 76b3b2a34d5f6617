"""Spoken requests: JSON Lines with audio files. Every bad record names its line, every bad clip its file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.errors import InputError
from calibration.requests import SpokenRequest, read_requests, requests_digest

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_audio_is_relative_to_the_file_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path,
        '{"audio": "a/1.wav", "text": "hello"}',
        "",
        '{"audio": "/abs.wav", "text": "x", "transcript": "said"}',
    )
    assert read_requests(path) == (
        SpokenRequest(tmp_path / "a" / "1.wav", "hello"),
        SpokenRequest(Path("/abs.wav"), "x", "said"),
    )


def test_a_byte_order_mark_windows_line_ends_and_unicode_separators_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    lines = ['{"audio": "1.wav", "text": "a\u2028b\u0085c"}', '{"audio": "2.wav", "text": "d"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [request.text for request in read_requests(path)] == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ('{"audio": "a.wav", "text": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('"text"', "is a str; expected an object"),
        ("[]", "is a list; expected an object"),
        ('{"text": "x"}', "audio is None"),
        ('{"audio": "a.wav"}', "text is None"),
        ('{"audio": "", "text": "x"}', "audio is ''"),
        ('{"audio": 3, "text": "x"}', "audio is 3"),
        ('{"audio": "a.wav", "text": ["x"]}', "text is ['x']"),
        ('{"audio": "a.wav", "text": "x", "transcript": 1}', "transcript is 1"),
        ('{"audio": "a.wav", "text": "\\ud800"}', "text is '\\ud800', which is not valid text"),
        ('{"audio": "a\\u0000.wav", "text": "x"}', "which is not valid text"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path, '{"audio": "a.wav", "text": "x"}', "", line)
    with pytest.raises(InputError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(message)):
        read_requests(path)


@settings(max_examples=100, deadline=None)
@given(line=st.text(min_size=1))
def test_only_input_errors_escape_from_a_random_line(
    tmp_path_factory: pytest.TempPathFactory, line: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_requests(path)


def test_a_missing_empty_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_requests(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no requests"):
        read_requests(write_lines(tmp_path, "", "  "))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_requests(tmp_path / "binary")
    with pytest.raises(InputError, match="holds no data that can be read; expected audio files"):
        read_requests(tmp_path)


def test_a_limit_draws_the_same_subset_for_the_same_seed_in_file_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *(json.dumps({"audio": f"{n:03}.wav", "text": "x"}) for n in range(50)))
    first = read_requests(path, limit=10, seed=3)
    assert first == read_requests(path, limit=10, seed=3)
    assert len(first) == len(set(first)) == 10
    assert list(first) == sorted(first, key=lambda request: request.audio)
    assert first != read_requests(path, limit=10, seed=4)
    assert first != read_requests(path)[:10]


@pytest.mark.parametrize("limit", [50, 51, None])
def test_a_limit_that_is_not_exceeded_changes_nothing(tmp_path: Path, limit: int | None) -> None:
    path = write_lines(tmp_path, *(json.dumps({"audio": f"{n}.wav", "text": "x"}) for n in range(50)))
    assert len(read_requests(path, limit=limit)) == 50


# ---------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_of_content_and_order_not_of_paths(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    soundfile.write(tmp_path / "b.wav", tone(hertz=700), RATE)
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    one, other = SpokenRequest(tmp_path / "a.wav", "x"), SpokenRequest(tmp_path / "b.wav", "x")
    digest = requests_digest([one, other])
    assert requests_digest([SpokenRequest(tmp_path / "copy.wav", "x"), other]) == digest
    assert requests_digest([other, one]) != digest
    assert requests_digest([one]) != digest
    assert requests_digest([SpokenRequest(tmp_path / "a.wav", "y"), other]) != digest
    assert requests_digest([SpokenRequest(tmp_path / "a.wav", "x", "said"), other]) != digest
    assert requests_digest([one, SpokenRequest(tmp_path / "a.wav", "x")]) != digest


def test_the_digest_of_a_missing_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.wav: cannot be read"):
        requests_digest([SpokenRequest(tmp_path / "none.wav", "x")])
