"""What is known of a graph before an engine is built of it, what engines are called, and which are built."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import EngineError, InputError, UnsupportedError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from engines.backends import BACKENDS
from engines.cuda_driver import CudaDriver, Gpu
from engines.profiles import ProfileLimits
from engines.sidecar import Binding, EngineRecord, Refit
from graph_passes.patch import patch_model
from graph_passes.plan_names import FINGERPRINT_KEY, name_plan
from graph_passes.selection import LastFrom, PromptFrom, SteeringInputs, StrengthInput
from sarsteer_export.engine_build import BuiltEngine, EngineSettings, build_engines, engine_source, label
from tests.conftest import random_basis, random_vector
from tests.decoders import HAND_HEADS, HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.sarsteer_export.command_line import listing

RTX = BACKENDS["tensorrt-rtx"]
SMALL: dict[str, Any] = {"max_batch": 2, "max_prompt": 4, "max_total": 8}


def plan_of(*edits: Edit) -> SteeringPlan:
    return SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)


def add(layer: int, seed: int = 0, **more: Any) -> Add:
    return Add(layer, random_vector(HAND_WIDTH, seed=seed), strength=0.5, **more)


def project(layer: int, **more: Any) -> Project:
    mean = random_vector(HAND_WIDTH, seed=layer + 70)
    return Project(layer, random_basis(HAND_WIDTH, 2, seed=layer), mean, strength=1.5, **more)


@pytest.fixture(scope="module")
def unsteered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-written decoder, its weights in a file beside it. Read-only for tests."""
    folder = tmp_path_factory.mktemp("hand")
    _, proto = hand_decoder(Variant(), folder / "whole.onnx")
    entry = proto.metadata_props.add()
    entry.key, entry.value = FINGERPRINT_KEY, "ab" * 32
    (folder / "whole.onnx").unlink()
    path = folder / "decoder.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def steer(unsteered: Path, plan: SteeringPlan, name: str = "steered.onnx", **how: Any) -> Path:
    """The decoder steered by a plan, beside the unsteered one."""
    graph = onnx.load(unsteered, load_external_data=False)
    path = unsteered.with_name(name)
    path.write_bytes(patch_model(graph, plan, **how).model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def steered(unsteered: Path) -> Path:
    """The decoder with an addition at two blocks. Read-only for tests."""
    return steer(unsteered, plan_of(add(0), add(1, seed=1, positions=Positions.ALL)))


# --- what is known of a graph --------------------------------------------------------------------------------


def test_the_interface_and_identity_of_a_steered_graph(steered: Path) -> None:
    source = engine_source(steered)
    cache = ("batch", HAND_HEADS, "past", HAND_WIDTH // HAND_HEADS)
    assert source.inputs[0].dims[2] == HAND_WIDTH
    assert {binding.name for binding in source.inputs} == {
        "inputs_embeds",
        "attention_mask",
        *(f"past_key_values.{layer}.{kind}" for layer in range(HAND_LAYERS) for kind in ("key", "value")),
    }
    assert Binding("past_key_values.0.key", "float32", cache) in source.inputs
    assert next(binding.dtype for binding in source.inputs if binding.name == "attention_mask") == "int64"
    assert [binding.name for binding in source.outputs][:2] == ["logits", "present.0.key"]
    assert (source.graph, source.precision, source.content) == (steered, "float32", None)
    assert source.identity == {
        "file": "steered.onnx",
        "sha256": hashlib.sha256(steered.read_bytes()).hexdigest(),
        "external_data": {
            "weights.bin": hashlib.sha256(steered.with_name("weights.bin").read_bytes()).hexdigest()
        },
        "model_fingerprint": "ab" * 32,
    }
    assert source.plan_sha256 == plan_of(add(0), add(1, seed=1, positions=Positions.ALL)).digest()


def test_an_unsteered_graph_requires_no_constants(unsteered: Path) -> None:
    source = engine_source(unsteered)
    assert (source.constants, source.plan_sha256) == ((), None)


def test_every_constant_must_be_computed_with_and_those_with_dimensions_may_be_refitted(
    unsteered: Path,
) -> None:
    path = steer(unsteered, plan_of(add(0), project(1), project(2, positions=Positions.ALL)), "both.onnx")
    found = {
        c.name.removeprefix("sarsteer."): (c.consumer, c.refittable) for c in engine_source(path).constants
    }
    product, difference = ("MATRIX_MULTIPLY", True), ("ELEMENTWISE SUB", True)
    assert found == {
        "0.block_output.add.0.vector": ("ELEMENTWISE SUM", True),
        "0.block_output.add.0.nothing": ("ELEMENTWISE SUM", False),
        "1.block_output.project.0.mean": difference,
        "1.block_output.project.0.basis": product,
        "1.block_output.project.0.basis_scaled": product,
        "1.block_output.project.0.nothing": ("ELEMENTWISE SUB", False),
        "2.block_output.project.0.mean": difference,
        "2.block_output.project.0.basis": product,
        "2.block_output.project.0.basis_scaled": product,
    }


def test_the_values_of_constants_are_the_graphs(unsteered: Path) -> None:
    plan = plan_of(add(1, seed=4))
    (vector, nothing) = engine_source(steer(unsteered, plan, "one.onnx")).constants
    np.testing.assert_array_equal(vector.values, np.float32(0.5) * random_vector(HAND_WIDTH, seed=4))
    assert (nothing.values.shape, bool(np.signbit(nothing.values))) == ((), True)


@pytest.mark.parametrize(
    ("edits", "acting"),
    [
        ((add(1), project(1)), ["1.block_output.add.0", "1.block_output.project.0"]),
        ((project(1), add(1)), ["1.block_output.project.0", "1.block_output.add.0"]),
        ((add(2), add(0)), ["0.block_output.add.0", "2.block_output.add.0"]),
        (
            (add(1, site=Site.BLOCK_INPUT), project(0)),  # the same tensor: what a block puts out acts first
            ["0.block_output.project.0", "1.block_input.add.0"],
        ),
    ],
)
def test_constants_stand_in_the_order_in_which_their_edits_act(
    unsteered: Path, edits: tuple[Edit, ...], acting: list[str]
) -> None:
    path = steer(unsteered, plan_of(*edits), "ordered.onnx")
    model = onnx.load(path, load_external_data=False)
    shuffled = sorted(model.graph.initializer, key=lambda tensor: tensor.name, reverse=True)
    for turned in (False, True):
        if turned:  # the order of initializers says nothing
            model.graph.ClearField("initializer")
            model.graph.initializer.extend(shuffled)
        constants = engine_source(path, model).constants
        seen = dict.fromkeys(c.name.removeprefix("sarsteer.").rpartition(".")[0] for c in constants)
        assert list(seen) == acting


def test_a_constant_that_nothing_reads_is_still_required(steered: Path) -> None:
    """So that the build fails on it, instead of never looking for it."""
    model = onnx.load(steered, load_external_data=False)
    name = "sarsteer.0.block_output.add.0.vector"
    for node in model.graph.node:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = "sarsteer.1.block_output.add.0.vector"
    assert name in {constant.name for constant in engine_source(steered, model).constants}


def test_a_constant_of_an_unknown_operation_is_refused(steered: Path) -> None:
    model = onnx.load(steered, load_external_data=False)
    model.graph.initializer.append(
        numpy_helper.from_array(np.ones(HAND_WIDTH, np.float32), "sarsteer.0.block_output.rotate.0.matrix")
    )
    name_plan(model, "0" * 64)  # as a later release might have patched it
    with pytest.raises(
        InputError, match=r"no known operation: 'sarsteer\.0\.block_output\.rotate\.0\.matrix'"
    ):
        engine_source(steered, model)


def test_a_graph_in_memory_needs_no_file(steered: Path, tmp_path: Path) -> None:
    model = onnx.load(steered, load_external_data=False)
    source = engine_source(tmp_path / "graph.onnx", model)
    assert source.content == model.SerializeToString()
    assert source.identity == {"file": "graph.onnx"}
    assert source.inputs == engine_source(steered).inputs
    assert len(source.constants) == 3


@pytest.mark.parametrize("last_from", LastFrom)
def test_what_marks_last_positions_is_no_constant_of_an_edit(unsteered: Path, last_from: LastFrom) -> None:
    path = steer(unsteered, plan_of(add(0)), "last.onnx", inputs=SteeringInputs(last_from=last_from))
    assert len(engine_source(path).constants) == 2


def test_a_foreign_graph_with_numbers_written_as_names(exported_decoder: TinyDecoder) -> None:
    """The exporter of transformers: names that are not ours, and fixed dimensions as strings."""
    written = [
        dim.dim_param
        for value in exported_decoder.proto.graph.input
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param.isdigit()
    ]
    assert written, "the exporter writes numbers as strings no more; this test needs another graph"
    source = engine_source(exported_decoder.path)
    dims = [dim for binding in (*source.inputs, *source.outputs) for dim in binding.dims]
    assert not [dim for dim in dims if isinstance(dim, str) and dim.isdigit()]
    assert next(binding.dims[2] for binding in source.inputs if binding.name == "inputs_embeds") == 64
    assert any("layers.0" in binding.name for binding in source.inputs)
    assert (source.precision, source.constants) == ("float32", ())


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_the_precision_is_that_of_the_graphs_tensors(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "low.onnx")
    source = engine_source(steer(tmp_path / "low.onnx", plan_of(add(0), project(1))))
    assert source.precision == name
    assert {binding.dtype for binding in source.outputs} == {name}
    dtypes = {constant.name.rpartition(".")[2]: constant.values.dtype for constant in source.constants}
    wanted = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float16)
    assert dtypes == {"vector": wanted, "nothing": wanted} | dict.fromkeys(
        ("mean", "basis", "basis_scaled"), np.dtype(np.float32)
    )
    assert proto.graph.node


def integers(elem_type: int = TensorProto.INT64) -> onnx.ModelProto:
    """A graph that doubles a number."""
    value = helper.make_tensor_value_info("x", elem_type, [1])
    out = helper.make_tensor_value_info("y", TensorProto.INT64, [1])
    nodes = [helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.INT64)]
    nodes += [helper.make_node("Add", ["wide", "wide"], ["y"])]
    return helper.make_model(
        helper.make_graph(nodes, "integers", [value], [out]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )


def test_the_precision_of_a_graph_may_be_that_of_its_inputs_alone() -> None:
    assert engine_source(Path("graph.onnx"), integers(TensorProto.FLOAT16)).precision == "float16"


def test_dimensions_without_a_name_are_each_one_of_their_own() -> None:
    """Two that were shown alike would have to be equal in every profile and every feed."""
    model = integers(TensorProto.FLOAT16)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.ClearField("dim")
        for _ in range(2):
            value.type.tensor_type.shape.dim.add()
    source = engine_source(Path("graph.onnx"), model)
    assert (source.inputs[0].dims, source.outputs[0].dims) == (("x[0]", "x[1]"), ("y[0]", "y[1]"))


def test_a_graph_that_reads_what_is_no_tensor_is_refused() -> None:
    model = integers(TensorProto.FLOAT16)
    model.graph.input.append(helper.make_tensor_sequence_value_info("cache", TensorProto.FLOAT, [1]))
    with pytest.raises(UnsupportedError, match="'cache' of the graph is a sequence or an optional"):
        engine_source(Path("graph.onnx"), model)


def test_a_graph_of_integers_alone_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"graph\.onnx: no input or output is of float32, float16"):
        engine_source(Path("graph.onnx"), integers())


# --- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"engines": ("tensorflow",)}, UnsupportedError, "no engine 'tensorflow'"),
        (
            {"engines": ("tensorrt", "tensorrt-rtx", "tensorrt")},
            InputError,
            "--engine tensorrt is given twice",
        ),
        ({"max_batch": 0}, InputError, "--max-batch is 0"),
        ({"max_prompt": 0}, InputError, "--max-prompt is 0"),
        ({"max_total": 0}, InputError, "--max-total is 0"),
        ({"max_total": -1}, InputError, "--max-total is -1"),
        ({"max_prompt": 3000}, InputError, "--max-prompt 3000 is more than --max-total 2048"),
        ({"max_prompt": 9, "max_total": 8}, InputError, "--max-prompt 9 is more than --max-total 8"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        EngineSettings(**given)


@pytest.mark.parametrize(
    ("given", "longest", "limits"),
    [
        ({}, None, ProfileLimits(4, 1024, 2048)),
        ({}, 32768, ProfileLimits(4, 1024, 2048)),
        ({}, 512, ProfileLimits(4, 512, 512)),
        ({"max_prompt": 100}, 512, ProfileLimits(4, 100, 512)),
        ({"max_batch": 9, "max_total": 4096}, 512, ProfileLimits(9, 1024, 4096)),
        ({"max_total": 64}, None, ProfileLimits(4, 64, 64)),
    ],
)
def test_limits_come_from_what_is_given_the_model_and_defaults(
    given: dict[str, int], longest: int | None, limits: ProfileLimits
) -> None:
    assert EngineSettings(**given).limits(longest) == limits


def test_a_prompt_that_the_model_cannot_hold() -> None:
    with pytest.raises(InputError, match="--max-prompt 600 is more than --max-total 512"):
        EngineSettings(max_prompt=600).limits(512)


def test_profiles_are_derived_unless_shapes_are_given(steered: Path) -> None:
    inputs = engine_source(steered).inputs
    derived = EngineSettings(**SMALL).decoder_profiles(inputs, longest=6)
    assert [profile.name for profile in derived] == ["prefill", "decode"]
    assert derived[0].shapes["attention_mask"].max == (2, 8)
    assert EngineSettings().decoder_profiles(inputs, longest=6)[0].shapes["attention_mask"].max == (4, 6)
    shapes = (f"inputs_embeds:1x2x{HAND_WIDTH}", f"inputs_embeds:1x3x{HAND_WIDTH}")
    (given,) = EngineSettings(min_shapes=shapes[:1], max_shapes=shapes[1:], **SMALL).decoder_profiles(inputs)
    assert (given.shapes["inputs_embeds"].min, given.shapes["inputs_embeds"].max) == (
        (1, 2, HAND_WIDTH),
        (1, 3, HAND_WIDTH),
    )
    with pytest.raises(InputError, match="a profile needs shapes"):
        EngineSettings(profiles=("mine",)).decoder_profiles(inputs)


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """A machine with these GPUs, or none."""
    driver = CudaDriver(
        "13.0",
        tuple(Gpu("card", capability, 1) for capability in capabilities),
        None if capabilities else "no driver in this test",
    )
    for module in ("engines.cuda_driver", "engines.trt.build"):
        monkeypatch.setattr(f"{module}.cuda_driver", lambda: driver)


def test_an_engine_is_called_by_backend_version_target_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    start = f"tensorrt-rtx-{RTX.version()}-"
    two = EngineSettings(compute_capabilities=("12.0", "8.6"))
    assert label(RTX, EngineSettings(), "float16") == start + "sm80_86_89_120-float16"
    assert label(RTX, two, "float32") == start + "sm120_86-float32"
    here = dataclasses.replace(RTX, name="tensorrt", targets=())
    gpus(monkeypatch, "9.0", "8.9")
    assert label(here, EngineSettings(), "bfloat16") == f"tensorrt-{RTX.version()}-sm90-bfloat16"
    gpus(monkeypatch)
    assert label(here, EngineSettings(), "float32").endswith("-any-float32")


# --- which are built -----------------------------------------------------------------------------------------


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second backend that builds here, for one compute capability; its name."""
    pytest.importorskip("tensorrt_rtx")
    row = dataclasses.replace(RTX, name="tensorrt", targets=("8.9",))
    monkeypatch.setitem(BACKENDS, row.name, row)
    return row.name


def folder_of(backend: str, targets: str) -> str:
    return f"{backend}-{RTX.version()}-{targets}-float32"


def test_one_graph_several_engines(steered: Path, tmp_path: Path, other: str) -> None:
    seen: list[str] = []
    settings = EngineSettings(engines=("tensorrt-rtx", other), **SMALL)
    built = build_engines(
        str(steered), tmp_path / "e", settings, progress=lambda stage, *_: seen.append(stage)
    )
    folders = [folder_of("tensorrt-rtx", "sm80_86_89_120"), folder_of(other, "sm89")]
    assert [engine.path for engine in built] == [tmp_path / "e" / f / "steered.engine" for f in folders]
    assert set(listing(tmp_path / "e")) == {
        *folders,
        *(f"{folder}/steered{suffix}" for folder in folders for suffix in (".engine", ".json")),
    }
    for engine, name in zip(built, settings.engines, strict=True):
        assert EngineRecord.read(engine.path.with_suffix(".json")) == engine.record
        assert engine.record.backend == name
        assert engine.record.graph == engine_source(steered).identity
        assert [constant.name for constant in engine.record.steering] == [
            constant.name for constant in engine_source(steered).constants
        ]
    assert built[1].record.compute_capabilities == ("8.9",)
    assert list(dict.fromkeys(seen)) == [f"build steered for {name}" for name in settings.engines]


def test_one_engine_in_the_way_and_none_is_built(steered: Path, tmp_path: Path, other: str) -> None:
    taken = tmp_path / folder_of(other, "sm89") / "steered.json"
    taken.parent.mkdir()
    taken.write_text("mine")
    settings = EngineSettings(engines=("tensorrt-rtx", other), **SMALL)
    before = listing(tmp_path)
    with pytest.raises(InputError, match=r"steered\.json: exists; use --overwrite"):
        build_engines(steered, tmp_path, settings)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("failure", [EngineError, KeyboardInterrupt])
def test_when_one_engine_fails_or_is_interrupted_none_is_written(
    steered: Path, tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    """So that "nothing was written", which an interrupt ends with, is true. What stood there stands."""
    from engines.trt.build import build_engine

    finished: list[str] = []

    def build(source: Any, output: Path, backend: Any, *rest: Any, **more: Any) -> EngineRecord:
        if backend.name == other:
            output.write_bytes(b"half")
            raise failure("it fails in this test")
        finished.append(backend.name)
        return build_engine(source, output, backend, *rest, **more)

    monkeypatch.setattr("sarsteer_export.engine_build.build_engine", build)
    settings = EngineSettings(engines=("tensorrt-rtx", other), **SMALL)
    with pytest.raises(failure, match="it fails in this test"):
        build_engines(steered, tmp_path / "new" / "e", settings)
    assert finished == ["tensorrt-rtx"]
    assert listing(tmp_path) == {}
    old = tmp_path / folder_of("tensorrt-rtx", "sm80_86_89_120") / "steered.engine"
    old.parent.mkdir()
    old.write_text("old")
    before = listing(tmp_path)
    with pytest.raises(failure):
        build_engines(steered, tmp_path, settings, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("engines", "kind", "words"),
    [
        ((), InputError, "no engine is asked for; name one with --engine"),
        (("onnxruntime-cuda",), InputError, "onnxruntime-cuda runs the ONNX file itself"),
        (("tensorrt-rtx", "onnxruntime-cpu"), InputError, "onnxruntime-cpu runs the ONNX file itself"),
    ],
)
def test_what_is_no_engine_is_not_built(
    steered: Path, tmp_path: Path, engines: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        build_engines(steered, tmp_path / "e", EngineSettings(engines=engines, **SMALL))
    assert listing(tmp_path) == {}


def test_compute_capabilities_are_those_that_are_asked_for(steered: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    settings = EngineSettings(engines=("tensorrt-rtx",), compute_capabilities=("8.9", "12.0"), **SMALL)
    (built,) = build_engines(steered, tmp_path, settings)
    assert built.record.compute_capabilities == ("8.9", "12.0")
    assert built.path.parent.name == folder_of("tensorrt-rtx", "sm89_120")
    assert "compute capability 8.9, 12.0" in built.summary()
    assert "3 constants found in the network" in built.summary()
    assert "refittable: no: " in built.summary() or "refittable: 2 constants" in built.summary()


def test_the_summary_says_what_can_be_refitted(steered: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (built,) = build_engines(steered, tmp_path, EngineSettings(engines=("tensorrt-rtx",), **SMALL))
    for refit, words in (
        (Refit(("a", "b"), None), "refittable: 2 constants"),
        (Refit((), "for a reason"), "refittable: no: for a reason"),
    ):
        told = BuiltEngine(built.path, dataclasses.replace(built.record, refit=refit)).summary()
        assert words in told
    assert "profiles: prefill, decode" in told


FED = SteeringInputs(LastFrom.INPUT, PromptFrom.INPUT, StrengthInput.EDITS)


def fed_plan() -> SteeringPlan:
    """Every operation, at positions of every kind."""
    kinds = [Positions.LAST, Positions.ALL, Positions.PROMPT, Positions.first(2), Positions.range(1, 3)]
    edits = [add(number % HAND_LAYERS, seed=number, positions=kind) for number, kind in enumerate(kinds)]
    return plan_of(
        *edits, *(project(number % HAND_LAYERS, positions=kind) for number, kind in enumerate(kinds))
    )


def test_an_engine_must_be_fed_what_a_graph_has_a_default_for(unsteered: Path, tmp_path: Path) -> None:
    """TensorRT takes an initializer of an input's name for a constant: without care the input would be gone."""
    pytest.importorskip("tensorrt_rtx")
    plan = fed_plan()
    graph = steer(unsteered, plan, "fed.onnx", inputs=FED)
    (built,) = build_engines(graph, tmp_path, EngineSettings(engines=("tensorrt-rtx",), **SMALL))
    inputs = {binding.name: binding for binding in built.record.inputs}
    assert inputs["steering_strength"].dims == ("batch", len(plan.edits))
    assert inputs["steering_positions"].dims == inputs["steering_prompt_lengths"].dims == ("batch",)
    for profile in built.record.profiles:
        assert profile.shapes["steering_strength"].max == (SMALL["max_batch"], len(plan.edits))
        assert profile.shapes["steering_positions"].min == (1,)
    consumers = {constant.name: constant.consumer for constant in built.record.steering}
    assert consumers["sarsteer.0.block_output.add.0.vector"] == "ELEMENTWISE PROD"
    assert consumers["sarsteer.0.block_output.project.0.basis"] == "MATRIX_MULTIPLY"
    assert built.record.graph["sha256"] == hashlib.sha256(graph.read_bytes()).hexdigest()


def test_a_vector_on_the_bias_of_a_projection_is_followed_into_the_engine(
    unsteered: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = steer(unsteered, plan_of(add(0, positions=Positions.ALL)), "bias.onnx")
    assert any(
        node.output[0].endswith(".add.0.bias")
        for node in onnx.load(graph, load_external_data=False).graph.node
    )
    (built,) = build_engines(graph, tmp_path, EngineSettings(engines=("tensorrt-rtx",), **SMALL))
    assert [(c.name, c.consumer) for c in built.record.steering] == [
        ("sarsteer.0.block_output.add.0.vector", "ELEMENTWISE SUM")
    ]
