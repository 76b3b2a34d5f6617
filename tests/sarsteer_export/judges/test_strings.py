"""Refusals, answers and degenerate outputs are told apart by strings."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.errors import InputError
from sarsteer_export.judges.judge import Behaviour, Exchange
from sarsteer_export.judges.settings import JudgeSettings
from sarsteer_export.judges.strings import read_phrases


def judged(output: str, pattern: str | None = None, phrases: Path | None = None) -> Behaviour:
    judge = JudgeSettings(answer_pattern=pattern, refusal_phrases=phrases).open()
    (verdict,) = judge.judge([Exchange(output)])
    return verdict


@pytest.mark.parametrize(
    "output",
    [
        "I cannot assist with that.",
        "I'm sorry, but no.",
        "I\u2019m sorry, but no.",  # a typographic apostrophe, as models write it
        "Well. As an AI, I have limits.",
        "i CAN'T help",
        *read_phrases(),
    ],
)
def test_refusals(output: str) -> None:
    assert judged(output) is Behaviour.REFUSAL
    assert judged(output, "^Sure") is Behaviour.REFUSAL


@pytest.mark.parametrize(
    "output",
    [
        "Paris is the capital of France.",
        "one two three one two three",
        "no no no no",
        "I can do that; the answer is 42.",
        "ok",
    ],
)
def test_answers(output: str) -> None:
    assert judged(output) is Behaviour.ANSWER


@pytest.mark.parametrize(
    "output",
    ["", "  \n ", "the the the the the", "one two three one two three one two three", "I cannot assist " * 3],
)
def test_empty_and_looping_outputs_are_degenerate(output: str) -> None:
    assert judged(output) is Behaviour.DEGENERATE


def test_with_a_pattern_an_answer_must_match_it() -> None:
    pattern = r"^The answer is \d+"
    assert judged("The answer is 42.", pattern) is Behaviour.ANSWER
    assert judged("The answer is unclear.", pattern) is Behaviour.DEGENERATE
    assert judged("I cannot assist with that.", pattern) is Behaviour.REFUSAL


@pytest.mark.parametrize("pattern", ["(", "[a-", "*"])
def test_a_broken_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="is no regular expression"):
        JudgeSettings(answer_pattern=pattern)


def test_another_file_of_phrases_replaces_the_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text("# ours\n\n  Das Geht Nicht \n# i cannot\n", encoding="utf-8")
    assert read_phrases(file) == ("das geht nicht",)
    assert judged("Oh, das geht NICHT.", phrases=file) is Behaviour.REFUSAL
    assert judged("I cannot assist with that.", phrases=file) is Behaviour.ANSWER


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nothing but this\n\n", "holds no phrase"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "no such file"),
    ],
)
def test_a_file_of_phrases_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "phrases.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        JudgeSettings(refusal_phrases=file)


def test_the_identity_is_that_of_the_phrases_not_of_their_file(tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    one.write_text("no\nnever\n", encoding="utf-8")
    two.write_text("# the same\nnever\nno\n", encoding="utf-8")
    other.write_text("no\n", encoding="utf-8")
    identities = [JudgeSettings(refusal_phrases=file).identity() for file in (one, two, other)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["kind"] == "strings"
    assert JudgeSettings("^Sure").identity() != JudgeSettings().identity()
