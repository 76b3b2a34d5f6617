"""What is audited of ONNX files, bundles and engines, and through the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.errors import InputError
from calibration.plan import Positions, Site, SteeringPlan
from engines.sidecar import BuildFacts, EngineRecord, NetworkConstant, Refit, sidecar_of
from graph_passes.refit import plan_constants
from sarsteer_export import CombineRule, PatchSettings, audit, patch, refit
from sarsteer_export.bundle.manifest import (
    MANIFEST,
    PLAN,
    STEERED_DECODER,
    Manifest,
    describe_files,
    file_sha256,
)
from tests.conftest import one_edit, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder
from tests.graph_passes import attacks
from tests.sarsteer_export.command_line import answered, answered_json, listing, one_error, refused, sarsteer

THREE = SteeringPlan(
    HAND_WIDTH,
    HAND_LAYERS,
    tuple(
        one_edit(op, Site.BLOCK_OUTPUT, Positions.LAST, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer)
        for layer, op in enumerate(("add", "project", "add"))
    ),
)
VECTOR = "sarsteer.2.block_output.add.0.vector"


@dataclasses.dataclass(frozen=True)
class Files:
    decoder: Path
    plan: Path
    steered: Path
    altered: Path

    @property
    def folder(self) -> Path:
        return self.steered.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A decoder with its weights in a file beside it, steered, and steered with a vector altered. Read-only."""
    folder = tmp_path_factory.mktemp("made")
    _, proto = hand_decoder(Variant(), folder / "whole.onnx")
    onnx.save(proto, folder / "decoder.onnx", save_as_external_data=True, location="data", size_threshold=0)
    files = Files(
        *(folder / name for name in ("decoder.onnx", "plan.safetensors", "steered.onnx", "altered.onnx"))
    )
    THREE.save(files.plan)
    patch(files.decoder, THREE, files.steered)
    steered = onnx.load(files.steered, load_external_data=False)
    files.altered.write_bytes(attacks.negated(steered, VECTOR).SerializeToString())
    return files


def test_a_steered_file_is_present(made: Files) -> None:
    before = listing(made.folder)
    text = answered(sarsteer("audit", made.steered, "--plan", made.plan))
    assert f"3 of 3 edits of plan {THREE.digest()[:12]} are present" in text
    assert text.count(" present") == 3 + 1
    content = answered_json(sarsteer("audit", made.steered, "--plan", made.plan, "--json"))
    assert content["passed"] is True
    assert [edit["finding"] for edit in content["edits"]] == ["present"] * 3
    assert content["plan_sha256"] == THREE.digest()
    assert listing(made.folder) == before


def test_an_altered_file_ends_with_exit_code_6_and_says_where(made: Files) -> None:
    result = sarsteer("audit", made.altered, "--plan", made.plan)
    assert result.exit_code == 6
    assert "2 of 3 edits" in result.stdout
    assert [line.split()[7] for line in result.stdout.splitlines()[:3]] == ["present", "present", "altered"]
    one_error(result.stderr, "audit failed: edit 2", "is altered")
    as_json = sarsteer("audit", made.altered, "--plan", made.plan, "--json")
    assert as_json.exit_code == 6
    content = json.loads(as_json.stdout)
    assert content["passed"] is False
    assert len(content["failures"]) == 1


def test_an_unsteered_file_misses_every_edit(made: Files) -> None:
    result = sarsteer("audit", made.decoder, "--plan", made.plan)
    assert result.exit_code == 6
    one_error(result.stderr, "edit 0", "is missing", "and 2 more")


def test_without_a_plan_what_stands_there_is_listed(made: Files) -> None:
    text = answered(sarsteer("audit", made.steered))
    assert f"{'output of block 0':24} an addition of constants" in text
    assert f"{'output of block 1':24} a subtraction of constants" in text
    assert f"the file says that it is steered by plan {THREE.digest()[:12]}" in text
    result = sarsteer("audit", made.decoder)
    assert result.exit_code == 6
    one_error(result.stderr, "no steering stands on the residual stream")


def test_last_from_is_what_the_graph_must_read(made: Files, tmp_path: Path) -> None:
    columns = tmp_path / "columns.onnx"
    answered(sarsteer("patch", made.decoder, "--plan", made.plan, "--last-from", "sequence", "-o", columns))
    result = sarsteer("audit", columns, "--plan", made.plan)
    assert result.exit_code == 6
    one_error(result.stderr, "edit 0", "the last column")
    answered(sarsteer("audit", columns, "--plan", made.plan, "--last-from", "sequence"))


def test_several_plans_are_audited_as_one(made: Files, tmp_path: Path) -> None:
    more = SteeringPlan(
        HAND_WIDTH,
        HAND_LAYERS,
        (dataclasses.replace(THREE.edits[0], vector=random_vector(HAND_WIDTH, seed=9)),),
    )
    more.save(tmp_path / "more.safetensors")
    in_order = PatchSettings(combine=CombineRule.SEQUENCE)
    patch(made.decoder, [THREE, more], tmp_path / "both.onnx", in_order)
    plans = ("--plan", made.plan, "--plan", tmp_path / "more.safetensors")
    answered(sarsteer("audit", tmp_path / "both.onnx", *plans))
    result = sarsteer("audit", tmp_path / "both.onnx", "--plan", made.plan)
    assert result.exit_code == 6
    assert audit(tmp_path / "both.onnx", [THREE, more]).passed
    assert not audit(made.steered, [THREE, more]).passed
    with pytest.raises(InputError, match="plan 2 is for 4 blocks"):
        audit(made.steered, [THREE, dataclasses.replace(more, num_layers=4)])


def test_a_refitted_file_is_audited_by_its_new_plan(made: Files, tmp_path: Path) -> None:
    new = dataclasses.replace(THREE, edits=tuple(dataclasses.replace(e, strength=0.3) for e in THREE.edits))
    refit(made.steered, new, tmp_path / "refitted.onnx")
    assert audit(tmp_path / "refitted.onnx", new).passed
    assert not audit(tmp_path / "refitted.onnx", THREE).passed


def test_bad_input_is_refused(made: Files, tmp_path: Path) -> None:
    refused(sarsteer("audit", tmp_path / "nothing.onnx", "--plan", made.plan), "no such file")
    refused(sarsteer("audit", made.plan), "expected an ONNX file (.onnx), an engine (.engine) or a bundle")
    refused(sarsteer("audit", tmp_path), "not a bundle")
    refused(sarsteer("audit", made.steered, "--plan", made.steered), "not a readable safetensors file")
    wide = SteeringPlan(
        8, HAND_LAYERS, (dataclasses.replace(THREE.edits[0], vector=random_vector(8, seed=1)),)
    )
    wide.save(tmp_path / "wide.safetensors")
    refused(
        sarsteer("audit", made.steered, "--plan", tmp_path / "wide.safetensors"), "the plan is for width 8"
    )
    truncated = made.steered.read_bytes()[:-100]
    (tmp_path / "truncated.onnx").write_bytes(truncated)
    refused(sarsteer("audit", tmp_path / "truncated.onnx"), "truncated.onnx")


# ---------------------------------------------------------------------------------------------------------- bundles


def test_the_engines_of_a_bundle_are_audited_with_it(bundle_copy: Path, plan: SteeringPlan) -> None:
    """An honest engine of the bundle's decoder passes; a stray one, or one that is not steered, does not."""
    name, manifest = "engines/some/decoder.engine", Manifest.read(bundle_copy)
    engine = bundle_copy / name
    engine.parent.mkdir(parents=True)
    engine_of(bundle_copy / STEERED_DECODER, engine, plan)
    assert f"{name} is an engine that the manifest does not name" in audit(bundle_copy, plan).unexpected
    listed(bundle_copy, manifest)
    report = audit(bundle_copy, plan)
    assert report.passed
    assert any(note.startswith(f"{name}: an engine's own") for note in report.notes)
    rewritten(engine, plan_sha256=None, steering=())
    listed(bundle_copy, manifest)
    report = audit(bundle_copy, plan)
    assert not report.passed
    assert report.unexpected[0] == f"{name}: the sidecar names no plan; expected {plan.digest()[:12]}"
    rewritten(
        engine, plan_sha256=plan.digest(), steering=(), graph={"file": "elsewhere.onnx", "sha256": "0" * 64}
    )
    listed(bundle_copy, manifest)
    assert "--on-paper accepts that" in str(audit(bundle_copy, plan).unexpected)
    assert "--on-paper accepts that" not in str(audit(bundle_copy, plan, on_paper=True).unexpected)


def listed(bundle: Path, manifest: Manifest) -> None:
    """Make the manifest name every file of the bundle as it is now."""
    (bundle / MANIFEST).unlink()
    dataclasses.replace(manifest, files=describe_files(bundle)).write(bundle)


def test_a_bundle_is_audited_with_its_hashes(bundle_copy: Path, plan: SteeringPlan) -> None:
    text = answered(sarsteer("audit", bundle_copy, "--plan", bundle_copy / PLAN))
    assert f"{len(plan.edits)} of {len(plan.edits)} edits" in text
    assert f"the manifest says plan {plan.digest()[:12]}, parity passed" in text
    assert "files are the manifest's" in text
    assert audit(bundle_copy, plan).passed
    decoder = onnx.load(bundle_copy / STEERED_DECODER, load_external_data=False)
    name = next(t.name for t in decoder.graph.initializer if t.name.endswith("add.0.vector"))
    content = attacks.negated(decoder, name).SerializeToString()
    assert len(content) == (bundle_copy / STEERED_DECODER).stat().st_size
    (bundle_copy / STEERED_DECODER).write_bytes(content)
    report = audit(bundle_copy, plan)
    assert [edit.finding.value for edit in report.edits].count("altered") == 1
    assert report.unexpected == (f"{STEERED_DECODER.as_posix()} is not the file of the manifest",)


# ---------------------------------------------------------------------------------------------------------- engines


def engine_of(graph: Path, engine: Path, plan: SteeringPlan) -> EngineRecord:
    """An engine's file and sidecar; what the file holds is of no account, since nobody can read it here."""
    engine.write_bytes(b"opaque")
    constants = plan_constants(plan, lambda _: onnx.TensorProto.FLOAT)
    record = EngineRecord(
        backend="tensorrt-rtx",
        backend_version="1.0",
        compute_capabilities=("8.9",),
        precision="float32",
        inputs=(),
        outputs=(),
        profiles=(),
        graph={"file": graph.name, "sha256": file_sha256(graph)},
        engine={"file": engine.name, "bytes": 6, "sha256": file_sha256(engine)},
        plan_sha256=plan.digest(),
        steering=tuple(
            NetworkConstant(name, values.dtype.name, values.shape, "layer", "kind", compared=True)
            for name, values in constants.items()
        ),
        refit=Refit(tuple(name for name, values in constants.items() if values.ndim), None),
        build=BuildFacts(seconds=1.0, peak_rss_bytes=2, start_rss_bytes=1, layers=1, platform="here"),
        warnings=(),
    )
    record.write(sidecar_of(engine))
    return record


@pytest.fixture
def engine(made: Files, tmp_path: Path) -> Path:
    """An engine beside the ONNX file that it was built from."""
    shutil.copytree(made.folder, tmp_path / "built")
    engine_of(tmp_path / "built" / "steered.onnx", tmp_path / "built" / "steered.engine", THREE)
    return tmp_path / "built" / "steered.engine"


def rewritten(engine: Path, **changes: object) -> None:
    dataclasses.replace(EngineRecord.read(sidecar_of(engine)), **changes).write(sidecar_of(engine))


def test_an_engine_is_audited_by_its_sidecar_and_its_graph(engine: Path, made: Files) -> None:
    text = answered(sarsteer("audit", engine, "--plan", made.plan))
    assert "3 of 3 edits" in text
    assert "cannot be read back without its runtime and its GPU; audited is steered.onnx" in text


def test_an_engine_without_its_graph_rests_on_its_sidecar(engine: Path, made: Files) -> None:
    """Which is nobody's proof: it fails, unless the sidecar's word is asked for."""
    engine.with_suffix(".onnx").unlink()
    text = answered(sarsteer("audit", engine, "--plan", made.plan, "--on-paper"))
    assert "rests on the sidecar alone" in text
    assert "edits of plan" not in text
    result = sarsteer("audit", engine, "--plan", made.plan)
    assert result.exit_code == 6
    one_error(result.stderr, "the engine was not read", "--on-paper")
    assert not audit(engine, THREE).passed
    report = audit(engine, THREE, on_paper=True)
    assert report.passed
    assert report.on_paper
    assert report.edits == ()


def test_a_refitted_engine_is_not_judged_by_the_graph_of_its_old_plan(engine: Path) -> None:
    new = dataclasses.replace(THREE, edits=tuple(dataclasses.replace(e, strength=0.3) for e in THREE.edits))
    rewritten(engine, plan_sha256=new.digest())
    report = audit(engine, new, on_paper=True)
    assert report.passed
    assert report.on_paper
    assert not audit(engine, new).passed
    assert "refitted since" in report.notes[-1]


def test_an_engine_that_is_not_its_sidecars_or_not_the_plans_fails(engine: Path, made: Files) -> None:
    record = EngineRecord.read(sidecar_of(engine))
    engine.write_bytes(b"opaquE")
    assert "not the file that its sidecar describes" in audit(engine, THREE).unexpected[0]
    engine.write_bytes(b"opaque")
    assert audit(engine, THREE).passed
    rewritten(engine, steering=record.steering[1:])
    assert "of shape none; the plan has shape (16,)" in audit(engine, THREE).unexpected[0]
    rewritten(engine, steering=record.steering, plan_sha256=None)
    assert "the sidecar names no plan" in audit(engine, THREE).unexpected[0]
    rewritten(engine, plan_sha256=THREE.digest(), refit=Refit((), "not asked for"))
    graph = engine.with_suffix(".onnx")
    graph.write_bytes(made.altered.read_bytes())
    assert audit(engine, THREE).on_paper  # the file beside it is not the one that it was built from
    rewritten(engine, graph={"file": graph.name, "sha256": file_sha256(graph)})
    result = sarsteer("audit", engine, "--plan", made.plan)
    assert result.exit_code == 6
    one_error(result.stderr, "edit 2", "is altered")


def test_without_a_plan_an_engine_says_what_its_sidecar_claims(engine: Path) -> None:
    assert "the sidecar says plan" in answered(sarsteer("audit", engine))
    engine.with_suffix(".onnx").unlink()
    answered(sarsteer("audit", engine, "--on-paper"))
    rewritten(engine, steering=())
    result = sarsteer("audit", engine, "--on-paper")
    assert result.exit_code == 6
    one_error(result.stderr, "the sidecar names no steering")


def test_a_float_is_told_apart_from_its_neighbour(made: Files, tmp_path: Path) -> None:
    steered = onnx.load(made.steered, load_external_data=False)
    shutil.copy(made.folder / "data", tmp_path / "data")
    (tmp_path / "ulp.onnx").write_bytes(attacks.one_ulp(steered, VECTOR).SerializeToString())
    (edit,) = [edit for edit in audit(tmp_path / "ulp.onnx", THREE).edits if edit.finding.value != "present"]
    assert edit.number == 2
    vector = THREE.edits[2].tensors()["vector"] * np.float32(THREE.edits[2].strength)
    assert f"{np.spacing(np.abs(vector[0])):.3g}" in edit.detail
