"""The peak of memory within a block, of that block alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines import memory
from engines.memory import peak_memory

BLOCK, SLACK = 200_000_000, 20_000_000
"""Bytes that are allocated, and bytes by which other work of the process may blur a measurement."""
linux = pytest.mark.skipif(
    not (sys.platform == "linux" and memory.CLEAR.exists()), reason="only Linux can forget an earlier peak"
)


def allocate() -> None:
    """Touch every page of `BLOCK` bytes, and free them."""
    np.ones(BLOCK, np.uint8)


@linux
def test_what_was_freed_within_the_block_is_seen() -> None:
    with peak_memory() as peak:
        allocate()
    assert BLOCK - SLACK < peak.peak_bytes - peak.start_bytes < BLOCK + SLACK


@linux
def test_the_peak_of_an_earlier_block_is_forgotten() -> None:
    allocate()
    with peak_memory() as peak:
        pass
    assert peak.start_bytes > 0
    assert peak.peak_bytes - peak.start_bytes < SLACK


@linux
def test_it_is_measured_when_the_block_fails_too() -> None:
    measured = peak_memory()
    peak = measured.__enter__()
    allocate()
    assert not measured.__exit__(KeyError, KeyError(), None), "the error goes on"
    assert peak.peak_bytes - peak.start_bytes > BLOCK - SLACK


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource usage of this kind")
@pytest.mark.parametrize("write", [None, lambda path: path.write_text("Name: python\n", encoding="utf-8")])
def test_a_system_that_says_less_gives_the_peak_of_the_whole_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Callable[[Path], object] | None
) -> None:
    """Neither a missing file nor one without the entry is an error."""
    if write is not None:
        write(tmp_path / "status")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    allocate()
    with peak_memory() as peak:
        pass
    assert peak.peak_bytes >= BLOCK


def test_a_system_that_says_nothing_gives_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    monkeypatch.setitem(sys.modules, "resource", None)
    with peak_memory() as peak:
        pass
    assert (peak.start_bytes, peak.peak_bytes) == (0, 0)
