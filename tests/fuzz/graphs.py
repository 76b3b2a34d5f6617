"""Real decoder graphs to be mutated: hand-written ones, graphs of other exporters, and all of them steered."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
from onnx.external_data_helper import convert_model_to_external_data

from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_streams
from graph_passes.selection import LastFrom, PromptFrom, SteeringInputs, StrengthInput
from graph_passes.sites_file import sites_content
from tests.conftest import random_basis, random_vector
from tests.decoders import Variant, hand_decoder
from tests.foreign.exports import functions_graph
from tests.merged import merge_with_itself

FOREIGN = Path(__file__).parent.parent / "foreign"
VARIANTS = {
    "hand": Variant(),
    "hand_sandwich": Variant(residual="sandwich", tokens=True, head="capped"),
    "hand_parallel": Variant(residual="parallel", norm="layer", cache=False, mask=False),
}
COMMITTED = {
    "genai_fp32": "genai_fp32/model.onnx",
    "genai_phi": "genai_phi/model.onnx",
    "optimum_merged": "optimum_merged/decoder_model_merged.onnx",
    "transformers_bf16": "transformers_bf16/model.onnx",
}
NAMES = (*VARIANTS, "external", "merged", "functions", *COMMITTED)
DATA = "weights.bin"
"""Where `external` keeps its weights."""
AT_RUN_TIME = SteeringInputs(LastFrom.ATTENTION_MASK, PromptFrom.INPUT, StrengthInput.EDITS)


@dataclass(frozen=True)
class Base:
    """A decoder graph, the file of its weights if it has one, the shape of plans that fit it, and its sites as JSON."""

    proto: onnx.ModelProto
    data: bytes | None
    width: int
    layers: int
    sites: str


@cache
def base(name: str, steering: str = "none") -> Base:
    """A graph by its name; `steering`: none, baked in, or with everything told at run time. Left as it is."""
    if steering != "none":
        bare = base(name)
        inputs = AT_RUN_TIME if steering == "input" else SteeringInputs()
        if name == "hand_parallel":  # it has neither a mask nor a past to tell positions by
            inputs = dataclasses.replace(inputs, last_from=LastFrom.SEQUENCE)
        steered = patch_model(bare.proto, fitting_plan(bare), inputs=inputs).model
        return dataclasses.replace(bare, proto=steered)
    with tempfile.TemporaryDirectory() as folder:
        proto, data = _made(name, Path(folder))
    stream = next(iter(find_residual_streams(proto).values()))
    return Base(proto, data, stream.hidden_size, len(stream.blocks), json.dumps(sites_content(stream)))


def fitting_plan(bare: Base) -> SteeringPlan:
    """A plan whose edits take every form of lowering: a bias, a mask of last positions, thin products."""
    edits: list[Edit] = [
        Add(0, random_vector(bare.width, seed=1), positions=Positions.ALL),
        Add(1, random_vector(bare.width, seed=2)),
        Project(1, random_basis(bare.width, 2, seed=3), site=Site.BLOCK_INPUT),
    ]
    return SteeringPlan(bare.width, bare.layers, tuple(edits))


def _made(name: str, folder: Path) -> tuple[onnx.ModelProto, bytes | None]:
    if name in COMMITTED:
        return onnx.load(FOREIGN / COMMITTED[name]), None
    if name == "functions":
        functions_graph("nested", folder)
        return onnx.load(folder / "model.onnx"), None
    proto = hand_decoder(VARIANTS.get(name, Variant()), folder / "model.onnx")[1]
    if name == "merged":
        return merge_with_itself(proto), None
    if name == "external":
        convert_model_to_external_data(proto, location=DATA, size_threshold=0)
        onnx.save(proto, folder / "external.onnx")
        return onnx.load(folder / "external.onnx", load_external_data=False), (folder / DATA).read_bytes()
    return proto, None
