"""The manifest of a bundle folder, before it was proven."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from calibration.model_options import driven_by
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import read_graph
from sarsteer_export.building.inputs import PACKAGES
from sarsteer_export.bundle.manifest import COMPONENTS, FRONTEND, Manifest
from sarsteer_export.bundle_frontend import frontend_of
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from graph_passes.patch import PatchResult
    from sarsteer_export.building.inputs import BuildInputs


def describe(
    lalm: Lalm,
    plan: SteeringPlan,
    patched: PatchResult,
    inputs: BuildInputs,
    folder: Path,
    missing: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a bundle folder, before it was proven; `missing`: what is not in it, with reasons."""
    driven = driven_by(lalm)
    graphs = {}
    for file in COMPONENTS.values():
        if not (folder / file).exists():
            continue
        graph = read_graph(folder / file)
        graphs[file.as_posix()] = {
            "inputs": [dataclasses.asdict(port) for port in graph_inputs(graph)],
            "outputs": [dataclasses.asdict(port) for port in graph_outputs(graph)],
        }
    return Manifest(
        versions=installed_versions(*PACKAGES),
        model={
            "class": type(lalm.model).__name__,
            "fingerprint": lalm.fingerprint,
            "dtype": str(lalm.model.dtype).removeprefix("torch."),
            **({} if driven is None else {"driven_by": driven}),
            FRONTEND: frontend_of(lalm),
            "adapter": lalm.adapter_type.__name__,
            "missing": missing or {},
        },
        tokens={
            "audio": lalm.adapter.audio_token_id,
            "end": list(lalm.adapter.end_token_ids),
            "pad": lalm.adapter.pad_token_id,
        },
        graphs=graphs,
        plan_sha256=plan.digest(),
        edits=[dataclasses.asdict(edit) for edit in patched.edits],
        parity={"verdict": None},
        stages=inputs.stages,
        files={},
    )
