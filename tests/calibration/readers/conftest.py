"""Clips for the tests of readers: short tones, each another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16_000


def write_tone(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * (300 + 40 * number) * np.arange(RATE // 10) / RATE), RATE)
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files of audio. Read-only."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_tone(folder / f"{number}.flac", number) for number in range(4)]
