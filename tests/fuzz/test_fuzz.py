"""No graph and no plan, however damaged, makes a command fail with more than one clear message.

Whatever the files hold: an exit code that is documented, one line of error, the input untouched, no leftovers; what
`patch` writes can be read, and `unpatch` gives back what was patched. `make fuzz` runs ten times as many cases, of
another seed each time; a case that fails there is kept in `seeds/`, by the JSON that is printed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings

from tests.fuzz.cases import CASES, SEEDS, Case, check

KEPT = sorted(SEEDS.glob("*.json"))
HEALTH = (HealthCheck.too_slow, HealthCheck.data_too_large)
SHORT = settings(
    max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=HEALTH
)
LONG = settings(
    max_examples=2000, database=None, deadline=None, suppress_health_check=HEALTH, print_blob=True
)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_case_that_once_failed(path: Path) -> None:
    check(Case.from_json(path.read_text(encoding="utf-8")))


def noted(case: Case) -> None:
    note(case.to_json())
    check(case)


@given(case=CASES)
@SHORT
def test_damaged_files_are_refused_or_used(case: Case) -> None:
    noted(case)


@pytest.mark.nightly
@given(case=CASES)
@LONG
def test_damaged_files_are_refused_or_used_at_length(case: Case) -> None:
    noted(case)
