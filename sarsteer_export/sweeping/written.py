"""What `sweep -o` leaves: sweep.json, sweep.md, sweep.svg, the statistics and the chosen plan, all or nothing."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from sarsteer_export.evaluation.written import finite
from sarsteer_export.staging import (
    SWEEP_JSON,
    SWEEP_MARKDOWN,
    SWEEP_PICTURE,
    SWEEP_PLAN,
    SWEEP_STATISTICS,
    staged_directory,
)
from sarsteer_export.sweeping.picture import sweep_svg

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.plan import SteeringPlan
    from sarsteer_export.sweeping.report import Sweep


def write_sweep(
    found: Sweep, plan: SteeringPlan | None, statistics: Path, folder: Path, *, overwrite: bool = False
) -> Sweep:
    """Write the folder, and return the sweep with the digest of its plan."""
    found = found.with_plan(None if plan is None else plan.digest())
    with staged_directory(folder, overwrite=overwrite) as staged:
        (staged / SWEEP_JSON).write_text(sweep_json(found), encoding="utf-8")
        page = f"# Sweep\n\n{found.markdown()}\n\n![attack success against damage]({SWEEP_PICTURE})\n"
        (staged / SWEEP_MARKDOWN).write_text(page, encoding="utf-8")
        (staged / SWEEP_PICTURE).write_text(sweep_svg(found), encoding="utf-8")
        shutil.copyfile(statistics, staged / SWEEP_STATISTICS)
        if plan is not None:
            plan.save(staged / SWEEP_PLAN)
    return found


def sweep_json(found: Sweep) -> str:
    """The report as a JSON file, a point a line."""
    content = finite(found.to_json())
    points = ",\n".join(json.dumps(point, allow_nan=False) for point in content.pop("points"))
    notes = json.dumps(content.pop("notes"))
    head = json.dumps(content, indent=2, allow_nan=False).removesuffix("\n}")
    return f'{head},\n  "notes": {notes},\n  "points": [\n{points}\n]}}\n'
