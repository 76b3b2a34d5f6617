"""Plans, and what `convert` makes of them: files for the tools themselves to read (`make/`). Seeded.

`python -m tests.sarsteer_export.interchange.written` writes `files/written.*` again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibration.plan import Add, Positions, Site, SteeringPlan
from sarsteer_export.interchange.convert import ConversionSettings, convert

FILES = Path(__file__).resolve().parent / "files"
LAYERS, WIDTH = 3, 32
OUTPUT, INPUT = Site.BLOCK_OUTPUT, Site.BLOCK_INPUT
PLACES = {
    "written.gguf": ((1, OUTPUT, 0.75), (2, OUTPUT, -0.5), (2, INPUT, 0.25)),
    "written.pt": ((0, OUTPUT, 0.75), (1, INPUT, 0.25), (2, OUTPUT, -0.5)),
    "written.svec": ((0, INPUT, 0.75), (0, OUTPUT, 0.25), (2, INPUT, -0.5)),
}
"""Layer, site and strength of each edit; two of each plan meet at one tensor of the stream."""


def plan_behind(name: str) -> SteeringPlan:
    """The plan that the file `name` was written from."""
    rng = np.random.default_rng(sorted(PLACES).index(name))
    edits = tuple(
        Add(layer, rng.standard_normal(WIDTH).astype(np.float32), strength, site, Positions.ALL)
        for layer, site, strength in PLACES[name]
    )
    return SteeringPlan(WIDTH, LAYERS, edits)


def write(name: str, folder: Path) -> Path:
    """Have `convert` write the file `name` into `folder`."""
    plan = folder / "plan.safetensors"
    plan_behind(name).save(plan)
    model_type = None if name.endswith(".pt") else "llama"
    convert(plan, folder / name, ConversionSettings(model_type=model_type), overwrite=True)
    plan.unlink()
    return folder / name


def main() -> None:
    """Write all of them to where they are committed."""
    for name in PLACES:
        write(name, FILES)


if __name__ == "__main__":
    main()
