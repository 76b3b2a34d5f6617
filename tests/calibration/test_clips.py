"""Clips are read once while there is room for them, and their length is known without reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration import states
from calibration.clips import Clips
from calibration.lalm import Lalm
from calibration.requests import SpokenRequest, read_requests


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The clips that are decoded, in order."""
    read: list[Path] = []
    load = states.load_audio
    monkeypatch.setattr(
        states, "load_audio", lambda source, **how: read.append(source) or load(source, **how)
    )
    return read


def test_checked_clips_are_not_read_again(lalm: Lalm, harmful_requests: Path, reads: list[Path]) -> None:
    requests = read_requests(harmful_requests)
    clips = Clips(lalm)
    for request in requests:
        clips.check(request)
    loaded = clips.load(requests)
    assert reads == [request.audio for request in requests]
    assert loaded is not None
    assert [clips.samples(request) for request in requests] == [clip.size for clip in loaded]


def test_clips_for_which_there_is_no_room_are_read_again(
    lalm: Lalm, harmful_requests: Path, reads: list[Path]
) -> None:
    first, second = read_requests(harmful_requests)[:2]
    (wanted,) = Clips(lalm).load([first]) or ()
    clips = Clips(lalm, kept_bytes=wanted.nbytes)
    clips.check(first)
    clips.check(second)
    reads.clear()
    got = clips.load([first, second])
    assert got is not None
    np.testing.assert_array_equal(got[0], wanted)
    assert reads == [second.audio]


def test_the_length_of_an_unread_clip_is_that_of_its_header(
    lalm: Lalm, harmful_requests: Path, reads: list[Path]
) -> None:
    request = read_requests(harmful_requests)[0]
    found = Clips(lalm).samples(request)
    assert not reads
    checked = Clips(lalm)
    checked.check(request)
    assert found == checked.samples(request) > 1000
    assert Clips(lalm).samples(SpokenRequest(None, "text alone")) == 0
