"""A bundle of bfloat16 graphs proven on the CPU: its float32 twin against the eager model in float32.

ONNX Runtime's CPU provider has no bfloat16 products. The twin holds the same graphs, their tensors turned into
float32 with the same values; the oracle is the eager model with the same rounded weights, attention scales and
steering, computing in float32. That proves structure, wiring and constants of the bfloat16 files. It does not
prove bfloat16 arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto

from calibration.decoder_parts import find_decoder
from calibration.plan import Add, Edit, SteeringPlan
from engines.backends import CPU_BACKEND
from graph_passes.float32_twin import write_float32_twins
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.lowering import StreamType
from graph_passes.onnx_file import read_graph
from sarsteer_export.bundle.manifest import MANIFEST, ONNX_FOLDER, PLAN, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calibration.lalm import Lalm
    from engines.report import ParityReport


TWIN_PRECISION = "float32 twin of bfloat16"
TWIN_NOTE = (
    "bfloat16: compared through a float32 twin of the graphs, with the rounded weights, attention scales and steering; "
    "structure, wiring and constants are proven, bfloat16 arithmetic is not"
)


@dataclass(frozen=True)
class Executable:
    """What of a bundle ONNX Runtime's CPU provider can run, and the model and plan that it must agree with.

    `plan_sha256`: of the plan as the bundle holds it. `precision`: what is computed in. `is_twin`: `folder` holds
    the float32 twins of the bundle's graphs.
    """

    folder: Path
    lalm: Lalm
    plan: SteeringPlan
    plan_sha256: str
    precision: str
    is_twin: bool = False

    @property
    def engine_name(self) -> str:
        """What runs it, for people."""
        return f"{CPU_BACKEND.name}, {TWIN_PRECISION}" if self.is_twin else CPU_BACKEND.name

    def labelled(self, report: ParityReport) -> ParityReport:
        """The report, saying what was compared when that was a twin."""
        if not self.is_twin:
            return report
        return dataclasses.replace(
            report,
            precision=TWIN_PRECISION,
            context=report.context | {"plan_sha256": self.plan_sha256},
            notes=(*report.notes, TWIN_NOTE),
        )


@contextmanager
def executable(
    folder: Path, lalm: Lalm, plan: SteeringPlan, scratch: Path | None = None
) -> Iterator[Executable]:
    """Within the block, a bundle folder that can be run on the CPU: `folder` itself or, in bfloat16, its twin.

    `scratch`: where the twin is written, by default the system's folder for temporary files.
    """
    dtype = Manifest.read(folder).model["dtype"]
    if dtype != "bfloat16":
        yield Executable(folder, lalm, plan, plan.digest(), dtype)
        return
    with float32_twin(folder, scratch) as twin:
        rounded = rounded_plan(plan, dtype)
        yield Executable(twin, float32_model(lalm), rounded, plan.digest(), "float32", is_twin=True)


@contextmanager
def float32_twin(folder: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Within the block, a bundle folder of the float32 twins of a bfloat16 bundle's graphs; then it is removed.

    `folder` needs its manifest, which may list no files yet. The twin opens as any bundle does; it has neither
    engines nor reports nor hashes. It takes twice the space of the graphs in the folder `scratch`, by default
    the system's for temporary files. Raises `InputError` for a damaged bundle or too little space.
    """
    manifest = Manifest.read(folder)
    with tempfile.TemporaryDirectory(prefix=".float32-twin-", dir=scratch) as made:
        twin = Path(made)
        for file in [*folder.iterdir(), folder / PLAN]:
            if file.is_file() and file.name != MANIFEST:
                target = twin / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        (twin / ONNX_FOLDER).mkdir()
        write_float32_twins(sorted((folder / ONNX_FOLDER).glob("*.onnx")), twin / ONNX_FOLDER)
        dataclasses.replace(
            manifest,
            model=manifest.model | {"dtype": "float32"},
            graphs={file: _ports(twin / file) for file in manifest.graphs},
            files={},
            engines=(),
        ).write(twin)
        yield twin


def float32_model(lalm: Lalm) -> Lalm:
    """A copy of a model, its constants as its graphs hold them, that computes in float32; `lalm` is left as it is.

    Weights are rounded already; attention's scales, which eager PyTorch never rounds, are rounded as the exporter
    does. Of a bfloat16 model the copy takes twice the memory, beside the model itself.
    """
    model: Any = copy.deepcopy(lalm.model)
    decoder = set(find_decoder(model).decoder.modules())
    for module in model.modules():
        if isinstance(scale := getattr(module, "scaling", None), float):
            module.scaling = _rounded_scale(scale, lalm.model.dtype, split=module in decoder)
    return dataclasses.replace(lalm, model=model.float())


def _rounded_scale(scale: float, dtype: torch.dtype, *, split: bool) -> float:
    """The scale that a graph applies; `split`: as two roots, to queries and to keys, each rounded by itself.

    Decoders leave the scale to PyTorch's attention, which the exporter takes apart in that way. Audio encoders
    multiply their queries by it.
    """
    held = torch.tensor(math.sqrt(scale) if split else scale, dtype=dtype).item()
    return held**2 if split else held


def rounded_plan(plan: SteeringPlan, elem: str) -> SteeringPlan:
    """The plan as a graph of element type `elem` ("bfloat16") holds it, in float32 and at strength 1.

    What is added is scaled and rounded, except at strength 0; projections are computed in float32 as they are.
    Raises `InputError` when a value overflows that type.
    """
    stream = StreamType(TensorProto.DataType.Value(elem.upper()))
    return dataclasses.replace(plan, edits=tuple(_rounded(edit, stream) for edit in plan.edits))


def _rounded(edit: Edit, stream: StreamType) -> Edit:
    if not isinstance(edit, Add) or edit.strength == 0:
        return edit
    held_D = stream.cast(np.float32(edit.strength) * edit.vector)
    return dataclasses.replace(edit, vector=held_D.astype(np.float32), strength=1.0)


def _ports(file: Path) -> dict[str, object]:
    graph = read_graph(file)
    return {
        "inputs": [dataclasses.asdict(port) for port in graph_inputs(graph)],
        "outputs": [dataclasses.asdict(port) for port in graph_outputs(graph)],
    }
