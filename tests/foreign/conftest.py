"""Every foreign decoder graph in turn, opened once a session."""

from __future__ import annotations

import pytest

from tests.foreign.cases import CASES, ForeignGraph, open_case
from tests.foreign.catalogue import OWN, own_graph


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ForeignGraph:
    """A foreign decoder graph with its PyTorch model. Tests leave both as they find them."""
    case = request.param
    if case.name in OWN:
        return own_graph(case, request.getfixturevalue(OWN[case.name][1]))
    return open_case(case, tmp_path_factory.mktemp(case.name))
