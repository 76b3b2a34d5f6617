"""JSON arrays, CSV and TSV: each record is read as from JSON Lines, each bad one is named."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.errors import InputError
from calibration.records import ReadSettings, SpokenRequest
from calibration.requests import read_requests

RECORDS = [
    {"audio": "a.wav", "text": "x", "transcript": "what is said, and\nmore"},
    {"audio": "/b.wav", "text": 'y "quoted"'},
]


def expected(folder: Path) -> tuple[SpokenRequest, ...]:
    return (
        SpokenRequest(folder / "a.wav", "x", "what is said, and\nmore"),
        SpokenRequest(Path("/b.wav"), 'y "quoted"'),
    )


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        "\ufeff" + json.dumps(RECORDS, indent=2) + "\n",
        "\r\n [ " + " ,\r\n".join(map(json.dumps, RECORDS)) + "]",
        "\n".join(map(json.dumps, RECORDS)),
    ],
    ids=["compact", "indented, byte order mark", "spaces", "JSON Lines under the name"],
)
def test_a_json_file_is_an_array_or_lines(tmp_path: Path, text: str) -> None:
    assert read_requests(write(tmp_path, "r.json", text)) == expected(tmp_path)


@pytest.mark.parametrize(("name", "mark"), [("r.csv", ","), ("r.TSV", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_quote_span_lines_and_may_have_other_columns(
    tmp_path: Path, name: str, mark: str, end: str
) -> None:
    rows = [
        ("speaker", "audio", "text", "transcript"),
        ("1", "a.wav", "x", '"what is said, and\nmore"'),
        ("2", "/b.wav", '"y ""quoted"""', ""),
    ]
    text = end.join(mark.join(row) for row in rows) + end + end
    assert read_requests(write(tmp_path, name, "\ufeff" + text)) == expected(tmp_path)


def test_records_say_where_they_are(tmp_path: Path) -> None:
    table = write(tmp_path, "r.csv", 'audio,text,transcript\na.wav,x,"1\n2"\n\nb.wav,y,\n')
    assert [request.where for request in read_requests(table)] == [f"{table}, line 2", f"{table}, line 5"]
    array = write(tmp_path, "r.json", json.dumps(RECORDS, indent=1))
    assert [request.where for request in read_requests(array)] == [
        f"{array}, record 1, line 2",
        f"{array}, record 2, line 7",
    ]


def test_columns_and_fields_may_have_other_names_and_the_prompt_may_be_given(tmp_path: Path) -> None:
    named = ReadSettings("Answer.", audio_column="wav", text_column="ask", transcript_column="said")
    wanted = (
        SpokenRequest(tmp_path / "a.wav", "own", "hello"),
        SpokenRequest(tmp_path / "b.wav", "Answer.", None),
    )
    table = write(tmp_path, "r.csv", "wav,ask,said\na.wav,own,hello\nb.wav,,\n")
    assert read_requests(table, settings=named) == wanted
    records = [{"wav": "a.wav", "ask": "own", "said": "hello"}, {"wav": "b.wav"}]
    assert read_requests(write(tmp_path, "r.json", json.dumps(records)), settings=named) == wanted
    lines = write(tmp_path, "r.jsonl", "\n".join(map(json.dumps, records)))
    assert read_requests(lines, settings=named) == wanted
    bare = write(tmp_path, "bare.csv", "audio\na.wav\n")
    assert read_requests(bare, settings=ReadSettings("Answer.")) == (
        SpokenRequest(tmp_path / "a.wav", "Answer."),
    )


@pytest.mark.parametrize(
    ("header", "given", "message"),
    [
        ("wav,text", {}, "no column 'audio', but 'wav', 'text'; name it with --audio-column"),
        ("audio,ask", {}, "no column 'text', but 'audio', 'ask'; name it with --text-column, or give"),
        ("audio;text", {"prompt": "x"}, "no column 'audio', but 'audio;text'"),
        ("audio,text", {"transcript_column": "said"}, "no column 'said'.*--transcript-column"),
        ("audio,text,text", {}, "names a column twice"),
        ("", {}, "no column 'audio', but nothing"),
    ],
)
def test_a_header_without_the_columns_is_refused(
    tmp_path: Path, header: str, given: dict[str, str], message: str
) -> None:
    path = write(tmp_path, "r.csv", header + "\n")
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + message):
        read_requests(path, settings=ReadSettings(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "audio,text\na,b\na,b,c\n", "line 3: has 3 cells; the header has 2"),
        ("r.csv", "audio,text\na\n", "line 2: has 1 cells; the header has 2"),
        ("r.csv", "audio,text\n,b\n", "line 2: audio is None"),
        ("r.csv", 'audio,text\na,"b\n', "line 2: cannot be read as a table"),
        ("r.csv", 'audio,text\na,"b"c\n', "line 2: cannot be read as a table"),
        ("r.csv", "audio,text\n", "holds no requests"),
        ("r.json", "[]", "holds no requests"),
        ("r.json", "[1]", "record 1, line 1: is a int; expected an object"),
        ("r.json", '[{"audio": "a", "text": "b"},\n {"audio": 3}]', "record 2, line 2: audio is 3"),
        ("r.json", '[{"audio": "a", "text": "b"},\n {"audio": }]', "record 2, line 2: not JSON"),
        ("r.json", '[{"audio": "a", "text": "b"}', "record 1, line 1: what follows it is not JSON"),
        ("r.json", '[{"audio": "a", "text": "b"} {}]', "record 1, line 1: what follows it is not JSON"),
        ("r.json", '[{"audio": "a", "text": "b"},]', "record 1, line 1: what follows it is not JSON"),
        ("r.json", '[{"audio": "a", "text": "b"}] []', "more than one JSON array"),
        ("r.json", "[" + "[" * 100_000, "record 1, line 1: not JSON"),
        ("r.json", "[", "record 1, line 1: not JSON"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_requests(path)


def read_or_refused(path: Path) -> tuple[SpokenRequest, ...]:
    """What a file holds; nothing when it is refused with its name."""
    with suppress(InputError):
        return read_requests(path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_requests(path)
    return ()


@pytest.mark.parametrize("name", ["fuzz.json", "fuzz.csv", "fuzz.tsv"])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet='[]{}",:\t\n\r 1aé\0')))
def test_only_input_errors_escape_from_random_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, text: str
) -> None:
    head = (
        "[" if name.endswith("json") else "audio,text\n".replace(",", "\t" if name.endswith("tsv") else ",")
    )
    path = write(tmp_path_factory.getbasetemp(), name, head + text)
    assert all(request.text for request in read_or_refused(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [
    "audio",
    "text",
    "transcript",
    "audio_file",
    "audio_name",
    "question",
    "question_id",
    "turns",
    "path",
]
FIELDS += ["task_name", "dataset_name"]


@settings(max_examples=100, deadline=None)
@given(records=st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3))
def test_only_input_errors_escape_from_random_fields(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "fields.json", json.dumps(records))
    assert all(request.text and request.audio is not None for request in read_or_refused(path))
