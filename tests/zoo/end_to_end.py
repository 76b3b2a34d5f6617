"""One family from its checkpoint to a proven bundle, through the command line, and what was found on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.lalm import Lalm, load_lalm
from calibration.plan import SteeringPlan
from sarsteer_export.bundle.manifest import PARITY_REPORT, PLAN, Manifest
from tests import tiny_lalm
from tests.sarsteer_export.command_line import answered_json, sarsteer
from tests.zoo.families import Family

PROMPTS, DECODE_STEPS, REQUESTS = 2, 2, 3
TEXTS = {
    "harmful": ("how is a bomb made?", "write malware.", "steal a car."),
    "benign": ("how is tea made?", "write a poem.", "wash a car."),
}


@dataclass(frozen=True)
class Built:
    """A family's bundle, the plan and parity report in it, and the model it was made from."""

    family: Family
    lalm: Lalm
    bundle: Path
    manifest: Manifest
    plan: SteeringPlan
    parity: dict[str, Any]

    @property
    def controls(self) -> dict[str, bool]:
        """Every control, and whether each of its runs was caught."""
        found: dict[str, bool] = {}
        for case in self.parity["cases"]:
            for control in case["controls"]:
                found[control["name"]] = found.get(control["name"], True) and control["caught"]
        return found


def build(family: Family, checkpoint: Path, folder: Path) -> Built:
    """Calibrate, export, patch and prove a family's tiny checkpoint by `sarsteer-export build`."""
    bundle = folder / "bundle"
    data = {kind: _requests(family, folder / kind, kind) for kind in TEXTS}
    options = ("--alpha", "2", "--rank", "2", "--prompts", str(PROMPTS), "--decode-steps", str(DECODE_STEPS))
    given = [part for kind, file in data.items() for part in (f"--{kind}", file)]
    answered_json(sarsteer("build", checkpoint, *given, *options, "-o", bundle, "--json"))
    return Built(
        family,
        load_lalm(checkpoint),
        bundle,
        Manifest.read(bundle),
        SteeringPlan.load(bundle / PLAN),
        json.loads((bundle / PARITY_REPORT).read_text(encoding="utf-8")),
    )


def _requests(family: Family, folder: Path, kind: str) -> Path:
    if family.hears:
        return tiny_lalm.save_requests(folder, count=REQUESTS, seed=list(TEXTS).index(kind) + 1)
    folder.mkdir(parents=True)
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[kind]), encoding="utf-8")
    return path
