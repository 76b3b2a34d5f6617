"""Which stages of an earlier bundle a build takes over, seen from the manifest alone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from engines.backends import BACKENDS
from engines.report import Verdict
from sarsteer_export.building.inputs import BuildInputs
from sarsteer_export.building.reuse import reusable_stages
from sarsteer_export.bundle.manifest import EngineEntry, Manifest

STAGES = {"calibrate": "c", "export": "e", "verify": "v"}


def earlier(*verdicts: Verdict) -> Manifest:
    """A bundle with engines of these verdicts."""
    engines = tuple(EngineEntry("tensorrt-rtx", "1.0", "float32", {}, verdict.value) for verdict in verdicts)
    return Manifest({}, {}, {}, {}, "", [], {}, STAGES, {}, engines)


def inputs(stages: dict[str, str] = STAGES) -> BuildInputs:
    return BuildInputs(Path("model"), "f", None, calibration={}, held_out={}, stages=stages)


@pytest.mark.parametrize("can_run", [True, False])
@pytest.mark.parametrize("verdict", [Verdict.PASSED, Verdict.NOT_EXECUTED])
def test_a_verdict_that_is_owed_is_asked_for_when_the_engine_can_be_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verdict: Verdict,
    can_run: bool,
) -> None:
    row = dataclasses.replace(BACKENDS["tensorrt-rtx"], module="json", runs_without_gpu=can_run)
    monkeypatch.setitem(BACKENDS, row.name, row)
    owed = verdict is Verdict.NOT_EXECUTED and can_run
    with caplog.at_level(logging.WARNING, logger="sarsteer_export"):
        found = reusable_stages(tmp_path, earlier(Verdict.PASSED, verdict), inputs())
    assert ("verify" in found) is not owed
    said = "tensorrt-rtx-1.0-float32 was built and not executed, and this machine can run it"
    assert any(said in record.getMessage() for record in caplog.records) is owed
