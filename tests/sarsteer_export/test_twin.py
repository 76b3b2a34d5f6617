"""A bfloat16 bundle is proven by its float32 twin: what the twin holds, what it catches, and that it goes away."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from calibration.errors import InputError, ParityError, UnsupportedError
from calibration.lalm import Lalm, load_lalm
from calibration.plan import Add, Positions, Project, Site, SteeringPlan
from calibration.requests import read_requests
from engines.report import ParityReport, Verdict
from graph_passes.float32_twin import write_float32_twins
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import patch_model
from graph_passes.steering_in import edit_initializers
from sarsteer_export.around_decoder import AroundDecoder
from sarsteer_export.building.inputs import read_inputs
from sarsteer_export.building.manifest import describe
from sarsteer_export.building.settings import BuildSettings
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import (
    AUDIO_ENCODER,
    ONNX_FOLDER,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    Manifest,
)
from sarsteer_export.parity_run import ParityRun, ParitySettings
from sarsteer_export.pipeline import export_components
from sarsteer_export.twin import TWIN_NOTE, executable, float32_model, float32_twin, rounded_plan
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, plan_of, random_basis, random_vector
from tests.sarsteer_export.command_line import listing
from tests.sarsteer_export.conftest import Inputs

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
SETTINGS = ParitySettings(prompts=2, decode_steps=2)
STEERING = plan_of(
    Add(0, random_vector(WIDTH, seed=1), strength=1.7),
    Project(1, random_basis(WIDTH, 3, seed=2), random_vector(WIDTH, seed=3), strength=0.9),
    Add(2, random_vector(WIDTH, seed=4), strength=-0.3, positions=Positions.ALL),
)
NOTHING = AroundDecoder((), ())


def attentions(lalm: Lalm) -> list[Any]:
    """The attention modules of audio encoder and decoder."""
    found = [module for module in lalm.model.modules() if hasattr(module, "scaling")]
    assert len(found) == 1 + LAYERS
    return found


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Lalm:
    """The tiny checkpoint in bfloat16, with attention scales that bfloat16 has to round. Read-only for tests."""
    lalm = load_lalm(checkpoint, dtype="bfloat16")
    for module in attentions(lalm):
        module.scaling *= 0.73
    return lalm


@pytest.fixture(scope="module")
def made(narrow: Lalm, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 bundle as a build has it before its proof. Read-only for tests; see `folder`."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    narrow.processor.save_pretrained(folder)
    (folder / PLAN).parent.mkdir()
    STEERING.save(folder / PLAN)
    export_components(narrow, folder, None)
    patched = patch_model(read_graph(folder / UNSTEERED_DECODER), STEERING)
    write_graph(patched.model, folder / STEERED_DECODER)
    settings = BuildSettings(inputs.harmful, inputs.benign, dtype="bfloat16")
    read = read_inputs(inputs.model, settings)
    describe(narrow, STEERING, patched, read, folder).write(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, for this test alone."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def proven(given: Path, lalm: Lalm, plan: SteeringPlan, inputs: Inputs) -> ParityReport:
    """Parity of the decoders in a folder that the CPU can run."""
    run = ParityRun(lalm, plan, read_requests(inputs.harmful)[:2], SETTINGS)
    return run.check_steering(run.check_export(given / UNSTEERED_DECODER), given / STEERED_DECODER, NOTHING)


def twin_report(folder: Path, narrow: Lalm, inputs: Inputs) -> ParityReport:
    """What parity says of a bfloat16 bundle by way of its twin."""
    with float32_twin(folder) as twin:
        return proven(twin, float32_model(narrow), rounded_plan(STEERING, "bfloat16"), inputs)


@pytest.mark.parametrize("strength", [0.7, -1.3, 0.0])
@pytest.mark.parametrize("op", ["add", "project"])
def test_a_rounded_plan_is_bit_for_bit_what_a_bfloat16_graph_holds(
    made: Path, tmp_path: Path, op: str, strength: float
) -> None:
    edits = [
        one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=number % LAYERS)
        for number, (site, positions) in enumerate(SITES)
    ]
    plan = plan_of(*(dataclasses.replace(edit, strength=strength) for edit in edits))
    unsteered = made / UNSTEERED_DECODER
    steered = unsteered.with_name(f"{tmp_path.name}.onnx")
    write_graph(patch_model(read_graph(unsteered), plan).model, steered)
    try:
        write_float32_twins([unsteered, steered], tmp_path)
    finally:
        steered.unlink()
    held = edit_initializers(read_graph(tmp_path / steered.name))
    again = patch_model(read_graph(tmp_path / unsteered.name), rounded_plan(plan, "bfloat16")).model
    wanted = edit_initializers(again)
    assert held.keys() == wanted.keys()
    assert len(held) == sum(
        (1 if op == "add" else 3) + (edit.positions is Positions.LAST) for edit in plan.edits
    )
    for name, tensor in wanted.items():
        assert (tensor.data_type, held[name].data_type) == (TensorProto.FLOAT, TensorProto.FLOAT)
        seen, expected = numpy_helper.to_array(held[name]), numpy_helper.to_array(tensor)
        assert (seen.shape, seen.tobytes()) == (expected.shape, expected.tobytes()), name


def test_what_is_added_is_scaled_before_it_is_rounded_and_nothing_else_is_changed() -> None:
    idle = Add(1, random_vector(WIDTH, seed=9), strength=0.0, site=Site.BLOCK_INPUT)
    plan = dataclasses.replace(STEERING, edits=(*STEERING.edits, idle), provenance={"seed": 3})
    rounded = rounded_plan(plan, "bfloat16")
    first, projection, _, still = rounded.edits
    product = np.float32(1.7) * plan.edits[0].tensors()["vector"]
    assert first == dataclasses.replace(
        plan.edits[0], vector=product.astype(ml_dtypes.bfloat16).astype(np.float32), strength=1.0
    )
    assert (projection, still) == (plan.edits[1], idle)
    assert (rounded.provenance, rounded.num_layers) == (plan.provenance, plan.num_layers)
    assert rounded_plan(rounded, "bfloat16") == rounded


def test_a_value_beyond_bfloat16_is_refused() -> None:
    vector = np.zeros(WIDTH, np.float32)
    vector[3] = np.finfo(np.float32).max
    with pytest.raises(InputError, match="overflows the stream's bfloat16"):
        rounded_plan(plan_of(Add(0, vector)), "bfloat16")


def test_the_float32_model_is_a_copy_with_the_rounded_weights(narrow: Lalm, lalm: Lalm) -> None:
    before = {name: tensor.clone() for name, tensor in narrow.model.state_dict().items()}
    wide = float32_model(narrow)
    assert (wide.model.dtype, narrow.model.dtype) == (torch.float32, torch.bfloat16)
    assert {tensor.dtype for tensor in wide.model.state_dict().values()} == {torch.float32}
    assert (wide.fingerprint, wide.processor) == (narrow.fingerprint, narrow.processor)
    after, full = narrow.model.state_dict(), lalm.model.state_dict()
    for name, tensor in wide.model.state_dict().items():
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
        assert torch.equal(tensor, full[name].bfloat16().float())
        assert after[name].data_ptr() != tensor.data_ptr()


def test_attention_scales_are_rounded_in_the_float32_model_as_the_exporter_rounds_them(
    made: Path, narrow: Lalm
) -> None:
    """16 wide heads: a scale of 0.73 / 4 on the queries of the encoder, its root on queries and keys of the decoder."""
    held = {"encoder": 0.73 / 4, "decoder": (0.73 / 4) ** 0.5}
    held = {name: float(ml_dtypes.bfloat16(scale)) for name, scale in held.items()}
    encoder, *decoder = attentions(float32_model(narrow))
    assert encoder.scaling == held["encoder"] != 0.73 / 4
    assert {module.scaling for module in decoder} == {held["decoder"] ** 2}
    assert {module.scaling for module in attentions(narrow)} == {0.73 / 4}
    for file, name in ((AUDIO_ENCODER, "encoder"), (STEERED_DECODER, "decoder")):
        scalars = [tensor for tensor in read_graph(made / file).graph.initializer if not tensor.dims]
        values = [float(numpy_helper.to_array(tensor).astype(np.float64)) for tensor in scalars]
        assert held[name] in values


def test_attention_scales_that_are_not_rounded_are_seen(
    made: Path, narrow: Lalm, inputs: Inputs, scratch: Path
) -> None:
    wide = float32_model(narrow)
    for module in attentions(wide):
        module.scaling = 0.73 / 4
    with float32_twin(made) as twin, pytest.raises(ParityError, match="unsteered export does not agree"):
        proven(twin, wide, rounded_plan(STEERING, "bfloat16"), inputs)


def test_the_twin_is_a_bundle_that_the_cpu_runs(made: Path, scratch: Path) -> None:
    before = listing(made)
    with float32_twin(made) as twin:
        assert twin.parent == scratch
        manifest, narrow_manifest = Manifest.read(twin), Manifest.read(made)
        assert manifest.model == narrow_manifest.model | {"dtype": "float32"}
        assert manifest.plan_sha256 == narrow_manifest.plan_sha256
        ports = [port for graph in manifest.graphs.values() for side in graph.values() for port in side]
        shapes = [
            port for graph in narrow_manifest.graphs.values() for side in graph.values() for port in side
        ]
        assert "BFLOAT16" in {port["elem_type"] for port in shapes}
        for port, original in zip(ports, shapes, strict=True):
            kind = original["elem_type"]
            assert port == original | {"elem_type": "FLOAT" if kind == "BFLOAT16" else kind}
        assert sorted(path.name for path in (twin / ONNX_FOLDER).iterdir()) == sorted(
            path.name for path in (made / ONNX_FOLDER).iterdir()
        )
        with Bundle(twin) as bundle:
            assert bundle.plan == STEERING
            assert bundle.has_unsteered
            bundle.generate(None, "hello", max_new_tokens=1)
    with pytest.raises(UnsupportedError, match="no bfloat16 products"):
        Bundle(made)
    assert listing(made) == before
    assert listing(scratch) == {}


def test_a_sound_bundle_passes_with_float32_limits_and_every_control_caught(
    made: Path, narrow: Lalm, inputs: Inputs, scratch: Path
) -> None:
    report = twin_report(made, narrow, inputs)
    assert report.verdict is Verdict.PASSED, report.failures()
    assert report.limits.max_abs == 1e-4
    assert {control.name for case in report.cases for control in case.controls} == {
        "unsteered",
        "wrong sign",
        "wrong positions",
        "wrong layer",
        "last column instead of last attended",
    }
    assert listing(scratch) == {}


def test_the_plan_must_be_rounded_as_the_graph_was(
    made: Path, narrow: Lalm, inputs: Inputs, scratch: Path
) -> None:
    """The limits see the difference between float32 steering and its bfloat16 roundings: they are that tight."""
    with float32_twin(made) as twin:
        report = proven(twin, float32_model(narrow), STEERING, inputs)
    assert report.verdict is Verdict.FAILED


def flipped(tensor: onnx.TensorProto) -> None:
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(-values, tensor.name))


def one_value_gone(tensor: onnx.TensorProto) -> None:
    values = numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values.astype(np.float32)).argmax()] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("harm", [flipped, one_value_gone])
@pytest.mark.parametrize(
    "name",
    [
        "sarsteer.0.block_output.add.0.vector",
        "sarsteer.1.block_output.project.0.basis_scaled",
        "sarsteer.1.block_output.project.0.mean",
        "sarsteer.2.block_output.add.0.vector",
    ],
)
def test_an_altered_steering_constant_fails(
    folder: Path,
    narrow: Lalm,
    inputs: Inputs,
    scratch: Path,
    name: str,
    harm: Callable[[onnx.TensorProto], None],
) -> None:
    graph = read_graph(folder / STEERED_DECODER)
    harm(edit_initializers(graph)[name])
    write_graph(graph, folder / STEERED_DECODER)
    report = twin_report(folder, narrow, inputs)
    assert report.verdict is Verdict.FAILED
    assert not [line for line in report.failures() if "baseline" in line]


def test_altered_weights_fail_before_any_steering(
    folder: Path, narrow: Lalm, inputs: Inputs, scratch: Path
) -> None:
    (data,) = (folder / ONNX_FOLDER).glob("decoder*_data")
    content = np.fromfile(data, np.uint16)
    content[content.size // 2 :] ^= 0x8000
    content.tofile(data)
    with pytest.raises(ParityError, match="unsteered export does not agree"):
        twin_report(folder, narrow, inputs)
    assert listing(scratch) == {}


def test_a_damaged_bundle_leaves_no_twin_behind(folder: Path, scratch: Path, tmp_path: Path) -> None:
    (data,) = (folder / ONNX_FOLDER).glob("embed_tokens*_data")
    data.write_bytes(data.read_bytes()[:-1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for place in (None, elsewhere):
        with pytest.raises(InputError, match=r"embed_tokens\.onnx_data has"), float32_twin(folder, place):
            pytest.fail("a damaged bundle has no twin")
    assert listing(scratch) == listing(elsewhere) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_proof_leaves_no_twin_behind(
    made: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def proof() -> None:
        with float32_twin(made, tmp_path) as twin:
            assert twin.parent == tmp_path
            assert twin.is_dir()
            raise error

    with pytest.raises(error):
        proof()
    assert listing(tmp_path) == {}


def test_a_report_by_way_of_a_twin_says_so_and_names_the_plan_of_the_bundle(
    made: Path, narrow: Lalm, inputs: Inputs, scratch: Path
) -> None:
    with executable(made, narrow, STEERING) as given:
        assert (given.precision, given.is_twin, given.lalm.model.dtype) == ("float32", True, torch.float32)
        plain = proven(given.folder, given.lalm, given.plan, inputs)
        report = given.labelled(plain)
    assert report.precision == "float32 twin of bfloat16"
    assert report.notes == (*plain.notes, TWIN_NOTE)
    assert report.context["plan_sha256"] == Manifest.read(made).plan_sha256 == STEERING.digest()
    assert report.context == plain.context | {"plan_sha256": STEERING.digest()}
    assert (report.cases, report.verdict) == (plain.cases, Verdict.PASSED)
    assert not given.folder.exists()


def test_a_bundle_that_the_cpu_runs_needs_no_twin(bundle_path: Path, lalm: Lalm, scratch: Path) -> None:
    with executable(bundle_path, lalm, STEERING) as given:
        assert (given.folder, given.lalm, given.plan) == (bundle_path, lalm, STEERING)
        assert (given.precision, given.is_twin) == ("float32", False)
        assert listing(scratch) == {}
        report = ParityRun(lalm, STEERING, (), SETTINGS).not_executed("here")
        assert given.labelled(report) is report
