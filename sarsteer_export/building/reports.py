"""What a build leaves beside its graphs: the reports, as files and in its result, and the final manifest."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.plan import SteeringPlan
from sarsteer_export.bundle.manifest import (
    BEHAVIOUR_REPORT,
    MANIFEST,
    PARITY_PAGE,
    PARITY_REPORT,
    PLAN,
    UNSTEERED_DECODER,
    EngineEntry,
    Manifest,
    describe_files,
)
from sarsteer_export.report_page import parity_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from engines.report import ParityReport
    from sarsteer_export.behaviour import BehaviourReport
    from sarsteer_export.building.inputs import BuildInputs
    from sarsteer_export.building.settings import BuildSettings


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, its reports as JSON, its engines, and the stages taken from an earlier build.

    `engine_behaviour`: behaviour on every engine that it was measured on, by the engine's label; each report holds
    its table. `data`: what was calibrated on and what was held out, by kind, counted.
    """

    path: Path
    parity: dict[str, Any]
    parity_table: str
    behaviour: dict[str, Any] | None
    behaviour_table: str | None
    engines: tuple[EngineEntry, ...]
    engine_behaviour: dict[str, dict[str, Any]]
    reused: tuple[str, ...]
    data: dict[str, dict[str, Any]]


def finish(
    folder: Path,
    manifest: Manifest,
    report: ParityReport,
    proven: Sequence[tuple[EngineEntry, ParityReport]],
    behaviour: BehaviourReport | None,
    measured: Sequence[tuple[EngineEntry, BehaviourReport]],
    inputs: BuildInputs,
    settings: BuildSettings,
) -> Manifest:
    """Write the reports and the final manifest."""
    _write_parity(folder / PARITY_REPORT, report)
    for entry, judged in proven:
        _write_parity(folder / entry.report, judged)
    if behaviour is not None:
        _write_json(folder / BEHAVIOUR_REPORT, with_table(behaviour, inputs, settings))
    for entry, found in measured:
        _write_json(folder / entry.behaviour, with_table(found, inputs, settings))
    if not settings.keep_unsteered:
        (folder / UNSTEERED_DECODER).unlink()
    parity = {"verdict": report.verdict.value, "backend": report.backend, "precision": report.precision}
    (folder / MANIFEST).unlink()
    engines = tuple(entry for entry, _ in proven)
    final = dataclasses.replace(manifest, parity=parity, engines=engines, files=describe_files(folder))
    final.write(folder)
    return final


def up_to_date(target: Path, manifest: Manifest) -> BuildResult:
    """The result of a build that had nothing to do, from the reports of the bundle at its output."""
    parity = json.loads((target / PARITY_REPORT).read_text(encoding="utf-8"))
    behaviour = None
    if (target / BEHAVIOUR_REPORT).is_file():
        behaviour = json.loads((target / BEHAVIOUR_REPORT).read_text(encoding="utf-8"))
    return BuildResult(
        path=target,
        parity=parity,
        parity_table=parity["table"],
        behaviour=behaviour,
        behaviour_table=None if behaviour is None else behaviour["table"],
        engines=manifest.engines,
        engine_behaviour={
            entry.label: json.loads((target / entry.behaviour).read_text(encoding="utf-8"))
            for entry in manifest.engines
            if (target / entry.behaviour).is_file()
        },
        reused=tuple(manifest.stages),
        data=data_counts(SteeringPlan.load(target / PLAN), behaviour),
    )


def data_counts(plan: SteeringPlan, behaviour: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What a plan says of its calibration sets, and what a report on behaviour says of those held out."""
    known = {kind: plan.provenance[kind] for kind in ("harmful", "benign") if kind in plan.provenance}
    held_out = {} if behaviour is None else behaviour.get("held_out", {})
    return known | {f"eval_{kind}": counts for kind, counts in held_out.items()}


def with_table(report: BehaviourReport, inputs: BuildInputs, settings: BuildSettings) -> dict[str, Any]:
    """A report on behaviour as JSON; it says who judged, what was skipped, and how many requests were no new ones."""
    table, overlap = report.table(), inputs.overlap
    if any(overlap.counts.values()):
        table += f"\nrequests that calibration saw: {overlap.text()}, which was allowed"
    return report.to_json() | {
        "held_out": inputs.held_out_counts,
        "overlap": overlap.counts,
        "judge": settings.judge.identity(),
        "table": table,
    }


def _write_parity(path: Path, report: ParityReport) -> None:
    path.parent.mkdir(exist_ok=True)
    _write_json(path, report.to_json() | {"table": report.table()})
    path.with_suffix(PARITY_PAGE.suffix).write_text(parity_page(report.to_json()), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
