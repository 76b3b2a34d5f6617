"""Every foreign decoder graph in turn, opened once a session."""

from __future__ import annotations

import pytest

from tests.foreign.cases import CASES, ForeignGraph, open_case


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ForeignGraph:
    """A foreign decoder graph with its PyTorch model. Tests leave both as they find them."""
    return open_case(request.param, tmp_path_factory.mktemp(request.param.name))
