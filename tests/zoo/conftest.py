"""Every supported family in turn: a tiny checkpoint of it and the loaded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.lalm import Lalm, load_lalm
from tests.zoo.families import FAMILIES, Family


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.identifier)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family."""
    found: Family = request.param
    return found


@pytest.fixture(scope="session")
def family_checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of the family with random weights. Read-only for tests."""
    return family.save(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def family_lalm(family_checkpoint: Path) -> Lalm:
    """That checkpoint, loaded. Tests leave it as they find it."""
    return load_lalm(family_checkpoint)


def clips(lalm: Lalm, *seconds: float) -> list[np.ndarray] | None:
    """Noise of these lengths at the model's rate; None for a model that takes no audio."""
    if not lalm.hears:
        return None
    random = np.random.default_rng(0)
    samples = [int(length * lalm.sampling_rate) for length in seconds]
    return [0.1 * random.standard_normal(count).astype(np.float32) for count in samples]
