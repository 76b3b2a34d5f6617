"""What may not be in two places: clips and transcripts of train and test, of harmful and benign."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import overlap
from calibration.errors import InputError
from calibration.overlap import (
    AllowedOverlap,
    check_disjoint,
    check_kinds,
    check_unseen,
    normalised,
    seen_digests,
)
from calibration.plan import Add, SteeringPlan
from calibration.records import SpokenRequest


def plan_with(seen: object) -> SteeringPlan:
    return SteeringPlan(4, 1, (Add(0, np.ones(4, np.float32)),), {} if seen is None else {"seen": seen})


def test_the_bytes_of_a_clip_are_read_once(tmp_path: Path) -> None:
    first, second = (request(tmp_path, number, f"{number}") for number in range(2))
    alone = SpokenRequest(None, "text alone")
    wanted = seen_digests([first, alone]), first.audio_sha256
    Path(str(first.audio)).unlink()
    check_kinds([first, alone], [second])
    assert (seen_digests([first, alone]), first.audio_sha256) == wanted
    assert alone.audio_sha256 is None


@pytest.fixture
def train(tmp_path: Path) -> tuple[SpokenRequest, ...]:
    return tuple(request(tmp_path, number, f"How do I do {number}?") for number in range(3))


def request(folder: Path, number: int, transcript: str | None, text: str = "Answer.") -> SpokenRequest:
    """A request whose clip is called and filled by its number; what is not decoded need not be audio."""
    clip = folder / f"{number}.wav"
    clip.write_bytes(f"clip {number}".encode())
    return SpokenRequest(clip, text, transcript, f"set, line {number}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I pick a lock?", "how do i  PICK\na lock"),
        ("Don’t stop", "don't stop!"),
        ("Ｆｕｌｌ width ２", "full width 2"),
        ("co-operate, please…", "co operate please"),
        ("Straße", "STRASSE"),
        ("e\u0301t\u00e9", "\u00e9te\u0301"),
        ("आप कैसे हैं?", "आप कैसे हैं"),
    ],
)
def test_transcripts_are_equal_when_they_sound_equal(one: str, other: str) -> None:
    assert normalised(one) == normalised(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pick a lock", "pick a clock"),
        ("take 2", "take 3"),
        ("now here", "nowhere"),
        ("कि", "की"),
        ("ete", "été"),
    ],
)
def test_other_words_stay_other_words(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_sets_apart_are_accepted(tmp_path: Path, train: tuple[SpokenRequest, ...]) -> None:
    test = [request(tmp_path, 7, "Something else"), request(tmp_path, 8, None), request(tmp_path, 9, "?!")]
    assert check_disjoint(train, test).counts == {"clips": 0, "transcripts": 0}
    assert check_unseen(plan_with(seen_digests(train)), test).counts == {"clips": 0, "transcripts": 0}
    assert check_disjoint([request(tmp_path, 1, "...")], test).counts == {"clips": 0, "transcripts": 0}


def test_a_clip_under_another_name_is_the_same_clip(tmp_path: Path, train: tuple[SpokenRequest, ...]) -> None:
    shutil.copy(tmp_path / "1.wav", tmp_path / "renamed.wav")
    test = [SpokenRequest(tmp_path / "renamed.wav", "x", None, "test, line 5"), request(tmp_path, 9, "new")]
    message = r"1 of 2 test requests are clips that calibration saw; .*:\n  test, line 5: the clip of "
    for allowed in (AllowedOverlap.NONE, AllowedOverlap.TRANSCRIPTS):
        with pytest.raises(InputError, match=message + r"set, line 1$"):
            check_disjoint(train, test, allowed)
        with pytest.raises(InputError, match=message + r"the plan's calibration$"):
            check_unseen(plan_with(seen_digests(train)), test, allowed)


def test_the_same_words_in_another_clip_are_refused_unless_allowed(
    tmp_path: Path, train: tuple[SpokenRequest, ...], caplog: pytest.LogCaptureFixture
) -> None:
    test = [request(tmp_path, 9, "how do I do 2")]
    plan = plan_with(seen_digests(train))
    with pytest.raises(
        InputError, match=r"say what calibration heard; .*--allow-overlap transcripts:\n.*set, line 2"
    ):
        check_disjoint(train, test)
    with pytest.raises(InputError, match="say what calibration heard"):
        check_unseen(plan, test)
    with caplog.at_level(logging.WARNING):
        found = check_disjoint(train, test, AllowedOverlap.TRANSCRIPTS)
    assert found == check_disjoint(train, test, AllowedOverlap.ALL)
    assert (
        found.counts
        == check_unseen(plan, test, AllowedOverlap.TRANSCRIPTS).counts
        == {"clips": 0, "transcripts": 1}
    )
    assert "calibration saw test requests: 0 by clip, 1 by transcript, of 1; allowed" in caplog.text
    assert check_disjoint(train, train, AllowedOverlap.ALL).counts == {"clips": 3, "transcripts": 3}


def test_requests_that_are_text_alone_say_their_text(train: tuple[SpokenRequest, ...]) -> None:
    typed = SpokenRequest(None, "How do I do 0", where="typed, line 1")
    with pytest.raises(InputError, match="typed, line 1: the transcript of set, line 0"):
        check_disjoint(train, [typed])
    with pytest.raises(InputError, match="say what calibration heard"):
        check_disjoint([typed], train)


def test_ten_are_named_and_the_others_counted(tmp_path: Path) -> None:
    many = [request(tmp_path, number, None) for number in range(13)]
    with pytest.raises(InputError, match="13 of 13 test requests") as error:
        check_disjoint(many, many)
    lines = str(error.value).split("\n  ")
    assert len(lines) == 12
    assert lines[-1] == "and 3 more"


def test_a_plan_remembers_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [request(tmp_path, number, f"number {number}") for number in range(20)]
    everything = seen_digests(many)
    assert {kind: len(digests) for kind, digests in everything.items()} == {"clips": 20, "transcripts": 20}
    monkeypatch.setattr(overlap, "MOST_SEEN", 5)
    kept = seen_digests(many)
    assert kept == {kind: sorted(digests)[:5] for kind, digests in everything.items()}
    assert kept == seen_digests([*reversed(many)])
    with pytest.raises(InputError, match="5 of 20 test requests are clips"):
        check_unseen(plan_with(kept), many)


def test_a_plan_that_does_not_say_what_it_saw_is_warned_of(
    train: tuple[SpokenRequest, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert check_unseen(plan_with(None), train).counts == {"clips": 0, "transcripts": 0}
    assert "does not say what it was calibrated on" in caplog.text


@pytest.mark.parametrize(
    "seen", [3, {}, {"clips": []}, {"clips": [], "transcripts": [1]}, {"clips": {}, "transcripts": []}]
)
def test_an_entry_of_another_form_is_refused(train: tuple[SpokenRequest, ...], seen: object) -> None:
    with pytest.raises(InputError, match="provenance has an entry 'seen' that is no object with clips"):
        check_unseen(plan_with(seen), train)


def test_a_clip_is_not_harmful_and_benign_at_once(
    tmp_path: Path, train: tuple[SpokenRequest, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        InputError, match=r"(?s)1 of 2 benign requests are clips that are harmful ones, too; .*set, line 1"
    ):
        check_kinds(train, [request(tmp_path, 9, "x"), train[1]])
    with caplog.at_level(logging.WARNING):
        check_kinds(train, [request(tmp_path, 9, "how do I do 1")])
    assert "1 of 1 benign requests say what a harmful one says, such as set, line 9" in caplog.text


def test_copies_within_a_set_are_counted(
    tmp_path: Path, train: tuple[SpokenRequest, ...], caplog: pytest.LogCaptureFixture
) -> None:
    other_question = dataclasses.replace(train[0], text="And who speaks?")
    with caplog.at_level(logging.WARNING):
        check_kinds([*train, other_question], [request(tmp_path, 9, "x")])
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        check_kinds([*train, train[0], train[0]], [request(tmp_path, 9, "x")])
    assert "2 of 5 harmful requests are copies of others" in caplog.text
