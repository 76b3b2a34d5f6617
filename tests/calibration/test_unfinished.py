"""What an interrupted calibration leaves, and what is gone on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import InputError
from calibration.statistics import StateStatistics
from calibration.unfinished import Found, UnfinishedFile
from tests.calibration.test_directions import LAYERS, random_states

KEY = {"model": "x", "harmful": {"count": 7}}


def found(harmful: set[int], benign: set[int], *, seed: int = 0) -> Found:
    states = random_states(harmful=len(harmful), benign=len(benign), seed=seed)
    parts = (
        StateStatistics.of_pairs(states.harmful_NLD, states.refused_NLD),
        StateStatistics.of_benign(states.benign_NLD),
    )
    peaks = np.random.default_rng(seed).random((2, LAYERS)).astype(np.float32)
    return Found(parts, frozenset(harmful), frozenset(benign), *peaks)


def test_what_was_kept_comes_back_and_is_removed_when_done(tmp_path: Path) -> None:
    file = UnfinishedFile(tmp_path / "new" / ".plan", KEY)
    assert file.load() is None
    kept = found({0, 3}, {1, 2, 4})
    file.save(kept, 0)
    loaded = file.load()
    assert loaded is not None
    assert (loaded.harmful, loaded.benign, loaded.count) == ({0, 3}, {1, 2, 4}, 5)
    np.testing.assert_array_equal(loaded.largest_L, kept.largest_L)
    np.testing.assert_array_equal(loaded.before_last_L, kept.before_last_L)
    for got, wanted in zip(loaded.parts, kept.parts, strict=True):
        np.testing.assert_array_equal(got.benign_root_LKD, wanted.benign_root_LKD)
    file.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_what_several_processes_kept_is_put_together_once(tmp_path: Path) -> None:
    file = UnfinishedFile(tmp_path / ".plan", KEY)
    first, second = found({0}, {1, 2}), found({5, 6}, {0}, seed=1)
    file.save(first.joined(second), 0)
    file.save(second, 3)  # of a run before, which the first process has taken up already
    file.save(found({2}, {4}, seed=2), 1)
    loaded = file.load()
    assert loaded is not None
    assert (loaded.harmful, loaded.benign) == ({0, 5, 6, 2}, {0, 1, 2, 4})
    assert sum(part.pairs for part in loaded.parts) == 4
    assert sum(part.benign for part in loaded.parts) == 4
    np.testing.assert_array_equal(
        loaded.largest_L,
        np.max([first.largest_L, second.largest_L, found({2}, {4}, seed=2).largest_L], axis=0),
    )
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_of_other_inputs_is_refused_and_named(tmp_path: Path) -> None:
    UnfinishedFile(tmp_path / ".plan", KEY).save(found({0}, {1}), 0)
    other = UnfinishedFile(tmp_path / ".plan", {**KEY, "harmful": {"count": 8}, "refusal_prompt": "no"})
    with pytest.raises(
        InputError, match=r"\.plan: .* of other inputs \(harmful, refusal_prompt\).*--no-resume"
    ):
        other.load()


@pytest.mark.parametrize("damage", ["bytes", "counts"])
def test_what_is_damaged_is_refused(tmp_path: Path, damage: str) -> None:
    file = UnfinishedFile(tmp_path / ".plan", KEY)
    kept = found({0}, {1})
    file.save(dataclasses.replace(kept, harmful=frozenset({0, 1})) if damage == "counts" else kept, 0)
    if damage == "bytes":
        (tmp_path / ".plan").write_bytes(b"no")
    with pytest.raises(InputError, match=r"\.plan: .*--no-resume"):
        file.load()
