"""`refit` on engines, from the command line and by the public API, in every precision that engines have.

TensorRT is the stand-in's; that a real engine computes with what was refitted, only a GPU shows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from calibration.errors import InputError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from engines.backends import BACKENDS
from engines.cuda_driver import cuda_driver
from engines.sidecar import BuildFacts, EngineRecord, NetworkConstant, Refit, sidecar_of
from engines.trt import opened
from engines.trt.refit import refit_engine
from graph_passes.patch import patch_model
from graph_passes.refit import refit_model
from graph_passes.selection import SteeringInputs, StrengthInput
from graph_passes.steering_in import steering_tensors
from graph_passes.steering_inputs import without_strength_default
from sarsteer_export import refit
from sarsteer_export.bundle.manifest import FORMAT, MANIFEST
from sarsteer_export.engine_build import engine_source
from sarsteer_export.refitting import engine_constants
from tests.conftest import random_basis, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder
from tests.engines.trt import stand_in
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, sarsteer

ROW = dataclasses.replace(
    BACKENDS["tensorrt-rtx"], module=stand_in.__name__, runs_without_gpu=True, targets=("8.9",)
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def vector(seed: int) -> np.ndarray:
    return random_vector(HAND_WIDTH, seed=seed)


def steering(seed: int, *, strength: float = 0.7, edits: int = 3) -> SteeringPlan:
    chosen: tuple[Edit, ...] = (
        Add(0, vector(seed), strength),
        Project(
            1, random_basis(HAND_WIDTH, 2, seed=seed), vector(seed + 1), strength, positions=Positions.ALL
        ),
        Add(2, vector(seed + 2), strength, site=Site.FINAL_NORM_OUTPUT),
    )
    return SteeringPlan(HAND_WIDTH, HAND_LAYERS, chosen[:edits])


OLD, NEW = steering(1), steering(50, strength=-1.1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which TensorRT-RTX runs."""
    monkeypatch.setitem(BACKENDS, ROW.name, ROW)
    monkeypatch.setattr(stand_in.HostStream, "made", [])
    monkeypatch.setattr(opened, "_open_stream", stand_in.HostStream)
    monkeypatch.setitem(opened.OpenEngine.__init__.__kwdefaults__, "device", "cpu")
    monkeypatch.setitem(refit_engine.__kwdefaults__, "device", "cpu")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """The hand-written decoder in every precision, by its name."""
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: hand_decoder(Variant(dtype=dtype), folder / f"{name}.onnx")[1] for name, dtype in DTYPES.items()
    }


Make = Callable[..., Path]


def sidecar_record(model: onnx.ModelProto, path: Path, *, reason: str | None = None) -> EngineRecord:
    """What a sidecar says of an engine of a steered graph that was built on a machine with a GPU."""
    source = engine_source(path.with_suffix(".onnx"), model)
    names = tuple(constant.name for constant in source.constants if constant.refittable)
    return EngineRecord(
        backend=ROW.name,
        backend_version=ROW.version(),
        compute_capabilities=("8.9",),
        precision=source.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=(),
        graph=source.identity,
        engine={"file": path.name, "bytes": path.stat().st_size if path.exists() else 0, "sha256": "0" * 64},
        plan_sha256=source.plan_sha256,
        steering=tuple(
            NetworkConstant(c.name, c.values.dtype.name, c.values.shape, c.consumer, "layer", True)
            for c in source.constants
        ),
        refit=Refit((), reason) if reason else Refit(names, None),
        build=BuildFacts(1.0, 1, 1, 1, "test"),
        warnings=(),
    )


@pytest.fixture
def engine(graphs: dict[str, onnx.ModelProto], tmp_path: Path) -> Make:
    """A refittable engine of the hand-written decoder steered by `OLD`, alone in a folder."""

    def make(
        dtype: str = "float32", *, reason: str | None = None, inputs: SteeringInputs | None = None
    ) -> Path:
        model = without_strength_default(
            patch_model(graphs[dtype], OLD, inputs=inputs or SteeringInputs()).model
        )
        path = tmp_path / "engine" / "decoder.engine"
        path.parent.mkdir()
        path.write_bytes(stand_in.serialized(model, (), refit=list(steering_tensors(model))))
        sidecar_record(model, path, reason=reason).write(sidecar_of(path))
        return path

    return make


@pytest.fixture
def new_plan(tmp_path: Path) -> Path:
    NEW.save(tmp_path / "new.safetensors")
    return tmp_path / "new.safetensors"


def graph_in(engine: Path) -> onnx.ModelProto:
    """The graph that an engine of the stand-in computes with."""
    blob = engine.read_bytes().removeprefix(stand_in.MAGIC)
    return onnx.load_from_string(blob.partition(b"\n")[2])


def initializers(model: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_precision_the_engine_holds_what_a_patched_graph_would(
    gpu: None, engine: Make, graphs: dict[str, onnx.ModelProto], new_plan: Path, tmp_path: Path, dtype: str
) -> None:
    old = engine(dtype)
    before = listing(old.parent)
    output = tmp_path / "out" / "decoder.engine"
    found = answered_json(sarsteer("refit", old, "--plan", new_plan, "-o", output, "--json"))
    wanted = patch_model(graphs[dtype], NEW).model
    assert initializers(graph_in(output)) == initializers(wanted)
    assert found == {
        "output": str(output),
        "plan_sha256": NEW.digest(),
        "constants": list(steering_tensors(wanted)),
    }
    assert listing(old.parent) == before
    sidecar = EngineRecord.read(sidecar_of(output))
    assert (sidecar.precision, sidecar.plan_sha256) == (dtype, NEW.digest())
    answered_json(sarsteer("refit", output, "--plan", new_plan, "--json"))  # and again, in place
    assert initializers(graph_in(output)) == initializers(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_that_is_fed_its_strength_keeps_its_vectors_in_float32(
    gpu: None, engine: Make, graphs: dict[str, onnx.ModelProto], new_plan: Path, tmp_path: Path, dtype: str
) -> None:
    fed = SteeringInputs(strength=StrengthInput.BATCH)
    output = tmp_path / "out" / "decoder.engine"
    answered(sarsteer("refit", engine(dtype, inputs=fed), "--plan", new_plan, "-o", output))
    wanted = without_strength_default(patch_model(graphs[dtype], NEW, inputs=fed).model)
    assert initializers(graph_in(output)) == initializers(wanted)
    vectors = [t for t in wanted.graph.initializer if t.name.endswith(".vector")]
    assert {vector.data_type for vector in vectors} == {onnx.TensorProto.FLOAT}


def test_an_engine_that_is_not_refittable_exits_3(
    gpu: None, engine: Make, new_plan: Path, tmp_path: Path
) -> None:
    old = engine(reason="built without a GPU")
    before = listing(tmp_path)
    result = sarsteer("refit", old, "--plan", new_plan, "-o", tmp_path / "out" / "new.engine")
    refused(result, "is not refittable: built without a GPU; build it again with the new plan", code=3)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("reason", [None, "built without a GPU"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_plan_of_another_width_is_told_so_whatever_else_is_wrong(
    gpu: None, engine: Make, tmp_path: Path, reason: str | None, first: int
) -> None:
    """No engine that could be refitted would take it, and no GPU would help."""
    wide = HAND_WIDTH + 1
    edits = (
        Add(0, random_vector(wide, seed=1)),
        Project(1, random_basis(wide, 2, seed=1), positions=Positions.ALL),
    )
    SteeringPlan(wide, HAND_LAYERS, edits[first:]).save(tmp_path / "wide.safetensors")
    old = engine(reason=reason)
    before = listing(tmp_path)
    result = sarsteer("refit", old, "--plan", tmp_path / "wide.safetensors", "-o", tmp_path / "new.engine")
    refused(result, f"{wide}", f"{HAND_WIDTH}", "width")
    assert listing(tmp_path) == before


def test_a_float16_engine_is_not_refitted_with_what_it_cannot_hold(
    gpu: None, engine: Make, tmp_path: Path
) -> None:
    entry = {kind: [70000.0] * HAND_LAYERS for kind in ("unsteered", "steered")}
    plan = dataclasses.replace(NEW, provenance={"largest_magnitude": entry})
    plan.save(tmp_path / "high.safetensors")
    old = engine("float16")
    before = listing(tmp_path)
    given = ("refit", old, "--plan", tmp_path / "high.safetensors", "-o", tmp_path / "out" / "new.engine")
    refused(sarsteer(*given), "reaches 70000", "the engine holds it in float16", "--allow-overflow")
    assert listing(tmp_path) == before
    allowed = sarsteer(*given, "--allow-overflow", "--json")
    assert answered_json(allowed)["plan_sha256"] == NEW.digest()
    assert "warning: the residual stream reaches 70000" in allowed.stderr


def test_without_a_gpu_a_refittable_engine_exits_3(engine: Make, new_plan: Path, tmp_path: Path) -> None:
    """The library is there, and no driver: what is refused is the machine, not the engine."""
    if (problem := cuda_driver().problem) is None:
        pytest.skip("this machine has a GPU")
    old = engine()
    before = listing(tmp_path)
    refused(sarsteer("refit", old, "--plan", new_plan), "runs on an NVIDIA GPU", problem, code=3)
    assert listing(tmp_path) == before


def test_an_engine_inside_a_bundle_is_refitted_outside_of_it(
    gpu: None, engine: Make, new_plan: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "engines").mkdir(parents=True)
    (bundle / MANIFEST).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
    inside = engine().parent.rename(bundle / "engines" / "rtx") / "decoder.engine"
    before = listing(bundle)
    for output in ([], ["-o", inside, "--overwrite"]):
        result = sarsteer("refit", inside, "--plan", new_plan, *output)
        refused(result, "belongs to the bundle", "name an output outside the bundle with -o")
    assert listing(bundle) == before
    outside = tmp_path / "outside" / "decoder.engine"
    answered_json(sarsteer("refit", inside, "--plan", new_plan, "-o", outside, "--json"))
    assert listing(bundle) == before
    assert set(listing(outside.parent)) == {"decoder.engine", "decoder.json"}


def test_a_sidecar_never_takes_the_place_of_a_bundles_manifest(
    gpu: None, engine: Make, new_plan: Path, tmp_path: Path
) -> None:
    old, bundle = engine(), tmp_path / "bundle"
    bundle.mkdir()
    (bundle / MANIFEST).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
    before = listing(tmp_path)
    result = sarsteer("refit", old, "--plan", new_plan, "-o", bundle / "manifest.engine", "--overwrite")
    refused(result, "manifest.engine: lies inside the bundle")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("new.json", r"new\.json: ends in '\.json'; an engine's name ends in \.engine"),
        ("new.onnx", r"new\.onnx: ends in '\.onnx'"),
        ("there.engine", r"there\.engine: exists; use --overwrite"),
        ("beside.engine", r"beside\.json: exists; use --overwrite"),
    ],
)
def test_an_output_that_cannot_be(gpu: None, engine: Make, tmp_path: Path, name: str, why: str) -> None:
    """An engine's sidecar has its name: neither may be lost to the other, nor to a file that stands there."""
    old = engine()
    for there in ("there.engine", "beside.json"):
        (tmp_path / there).write_text("precious", encoding="utf-8")
    before = listing(tmp_path)
    with pytest.raises(InputError, match=why):
        refit(old, NEW, tmp_path / name)
    assert listing(tmp_path) == before
    if name in ("there.engine", "beside.engine"):
        refit(old, NEW, tmp_path / name, overwrite=True)
        assert EngineRecord.read(sidecar_of(tmp_path / name)).engine["file"] == name


@pytest.mark.parametrize("damage", ["engine", "sidecar", "backend", "steering"])
def test_an_engine_that_is_not_its_sidecars(
    gpu: None, engine: Make, new_plan: Path, tmp_path: Path, damage: str
) -> None:
    old = engine()
    record = EngineRecord.read(sidecar_of(old))
    if damage == "engine":
        old.write_bytes(old.read_bytes()[:-1])
        why = "its sidecar says"
    elif damage == "sidecar":
        sidecar_of(old).unlink()
        why = "sidecar cannot be read"
    elif damage == "backend":
        dataclasses.replace(record, backend_version="0.1").write(sidecar_of(old))
        why = "was built with tensorrt-rtx 0.1"
    else:
        dataclasses.replace(record, steering=()).write(sidecar_of(old))
        why = "the engine holds no steering to refit"
    before = listing(tmp_path)
    refused(sarsteer("refit", old, "--plan", new_plan), why)
    assert listing(tmp_path) == before


def test_a_disk_that_fills_up_leaves_the_old_engine(
    gpu: None, engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is written, and then its sidecar is not."""
    old = engine()

    def fail(_record: EngineRecord, path: Path) -> None:
        path.write_text("{", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EngineRecord, "write", fail)
    before = listing(tmp_path)
    with pytest.raises(InputError, match="no space left on the device; nothing was written"):
        refit(old, NEW)
    assert listing(tmp_path) == before


# --- engine_constants and refit_model are one rule ---------------------------------------------------------------

sites = st.sampled_from(list(Site))
positions = st.sampled_from([Positions.LAST, Positions.ALL])
seeds = st.integers(0, 1000)
strengths = st.sampled_from([-1.5, 0.0, 0.25, 1.0])


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    site, seed = draw(sites), draw(seeds)
    layer = HAND_LAYERS - 1 if site is Site.FINAL_NORM_OUTPUT else draw(st.integers(0, HAND_LAYERS - 1))
    placement = {"strength": draw(strengths), "site": site, "positions": draw(positions)}
    if draw(st.booleans()):
        return Add(layer, vector(seed), **placement)
    basis = random_basis(HAND_WIDTH, draw(st.integers(1, 2)), seed=seed)
    return Project(layer, basis, vector(seed + 1) if draw(st.booleans()) else None, **placement)


def crowd(edit: Edit) -> Edit:
    """The edit moved to the tensor between the first two blocks, where the order of edits tells."""
    if edit.layer % 2:
        return dataclasses.replace(edit, layer=1, site=Site.BLOCK_INPUT)
    return dataclasses.replace(edit, layer=0, site=Site.BLOCK_OUTPUT)


def other_values(edit: Edit, seed: int) -> Edit:
    """An edit of the same kind at the same place."""
    if isinstance(edit, Add):
        return dataclasses.replace(edit, vector=vector(seed), strength=0.5)
    basis = random_basis(HAND_WIDTH, edit.basis.shape[1], seed=seed)
    return dataclasses.replace(edit, basis=basis, mean=None if edit.mean is None else vector(seed + 7))


@given(
    old=st.lists(edits(), min_size=1, max_size=4),
    change=st.sampled_from(["values", "order", "one edit", "one less", "one more"]),
    crowded=st.booleans(),
    other=edits(),
    data=st.data(),
    dtype=st.sampled_from(list(DTYPES)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sidecar_admits_the_plans_that_its_graph_admits_with_the_same_constants(
    graphs: dict[str, onnx.ModelProto],
    old: list[Edit],
    change: str,
    crowded: bool,
    other: Edit,
    data: st.DataObject,
    dtype: str,
) -> None:
    if crowded:
        old = [crowd(edit) for edit in old]
    steered = patch_model(graphs[dtype], SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(old))).model
    new = [other_values(edit, seed) for seed, edit in enumerate(old)]
    if change == "order":
        new = data.draw(st.permutations(new))
    elif change == "one edit":
        new[data.draw(st.integers(0, len(new) - 1))] = other
    elif change == "one less" and len(new) > 1:
        new.pop()
    elif change == "one more":
        new.append(other)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(new))
    record = sidecar_record(steered, Path("decoder.engine"))
    try:
        refitted = refit_model(steered, plan)
    except InputError:
        with pytest.raises(InputError):
            check_as_refit_engine_does(record, engine_constants(record, plan))
        return
    constants = engine_constants(record, plan)
    check_as_refit_engine_does(record, constants)
    wanted = steering_tensors(refitted)
    assert constants.keys() == wanted.keys()
    for name, values in constants.items():
        assert (values.dtype, values.shape) == (wanted[name].dtype, wanted[name].shape)
        assert values.tobytes() == wanted[name].tobytes()


@pytest.mark.parametrize("place", [(0, Site.BLOCK_OUTPUT), (1, Site.BLOCK_INPUT)])
def test_the_order_of_edits_tells_at_one_site_of_a_tensor(
    graphs: dict[str, onnx.ModelProto], place: tuple[int, Site]
) -> None:
    """What stands at a block's output acts before what stands at the next one's input, whatever the plan's order."""
    layer, site = place
    first, then = Project(0, random_basis(HAND_WIDTH, 2, seed=1)), Add(layer, vector(2), site=site)
    steered, swapped = (SteeringPlan(HAND_WIDTH, HAND_LAYERS, two) for two in ((first, then), (then, first)))
    record = sidecar_record(patch_model(graphs["float32"], steered).model, Path("decoder.engine"))
    if site is Site.BLOCK_INPUT:
        assert engine_constants(record, swapped).keys() == engine_constants(record, steered).keys()
    else:
        with pytest.raises(InputError, match="act on one tensor in another order than the engine's"):
            engine_constants(record, swapped)


def check_as_refit_engine_does(record: EngineRecord, constants: dict[str, np.ndarray]) -> None:
    """Shapes are compared where the engine is refitted, by the check that comes before it is opened."""
    held = {constant.name: (constant.dtype, constant.shape) for constant in record.steering}
    for name, values in constants.items():
        if held[name] != (values.dtype.name, values.shape):
            raise InputError(name)
