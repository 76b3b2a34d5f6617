"""Real TensorRT-RTX engines, built without a GPU: what comes out, what the sidecar says, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibration.errors import EngineError, InputError, UnsupportedError
from calibration.lalm import load_lalm
from engines.backends import BACKENDS
from engines.cuda_driver import CudaDriver, Gpu, cuda_driver
from engines.profiles import ProfileLimits, derive_profiles
from engines.sidecar import EngineRecord, Profile, ShapeRange, sidecar_of
from engines.trt.build import EngineSource, build_engine
from engines.trt.worker import run_interruptibly
from graph_passes.onnx_file import write_graph
from graph_passes.patch import patch_model
from sarsteer_export.engine_build import engine_source
from sarsteer_export.exporting.export import export_decoder
from tests.decoders import TinyDecoder
from tests.engines.trt.cases import PLAN

RTX = BACKENDS["tensorrt-rtx"]
SMALL = ProfileLimits(max_batch=2, max_prompt=8, max_total=16)


@pytest.fixture(scope="module")
def decoders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Decoders with the exported contract, by dtype, steered or unsteered."""
    made: dict[str, Path] = {}

    def decoder(dtype: str, kind: str) -> Path:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            export_decoder(load_lalm(checkpoint, dtype=dtype).model, folder / "unsteered.onnx")
            graph = onnx.load(folder / "unsteered.onnx", load_external_data=False)
            write_graph(patch_model(graph, PLAN).model, folder / "steered.onnx")
            made[dtype] = folder
        return made[dtype] / f"{kind}.onnx"

    return decoder


def build(
    graph: Path, folder: Path, profiles: tuple[Profile, ...] | None = None, **more: Any
) -> EngineRecord:
    source = engine_source(graph)
    chosen = derive_profiles(source.inputs, SMALL) if profiles is None else profiles
    return build_engine(source, folder / "decoder.engine", RTX, chosen, **more)


@pytest.mark.parametrize("kind", ["steered", "unsteered"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_engine_and_its_sidecar(
    decoders: Callable[[str, str], Path], tmp_path: Path, dtype: str, kind: str
) -> None:
    graph = decoders(dtype, kind)
    record = build(graph, tmp_path)
    engine = tmp_path / "decoder.engine"
    assert record == EngineRecord.read(sidecar_of(engine))
    assert engine.stat().st_size == record.engine["bytes"] > 0
    assert hashlib.sha256(engine.read_bytes()).hexdigest() == record.engine["sha256"]
    assert hashlib.sha256(graph.read_bytes()).hexdigest() == record.graph["sha256"]
    data = graph.with_name("unsteered.onnx_data")
    assert record.graph["external_data"] == {data.name: hashlib.sha256(data.read_bytes()).hexdigest()}
    assert record.precision == dtype
    assert (record.backend, record.backend_version) == ("tensorrt-rtx", RTX.version())
    assert record.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert [profile.name for profile in record.profiles] == ["prefill", "decode"]
    assert {binding.dtype for binding in record.outputs} == {dtype}
    assert record.inputs[0].dims == ("batch", "sequence", 64)
    assert record.build.seconds > 0
    assert record.build.peak_rss_bytes > record.build.start_rss_bytes > 50e6
    assert record.build.layers > 300
    if kind == "steered":
        assert record.plan_sha256 == PLAN.digest()
    else:
        assert record.plan_sha256 is None
        assert record.steering == ()
        assert "no steering constants" in str(record.refit.reason)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_edit_is_followed_into_the_network(
    decoders: Callable[[str, str], Path], tmp_path: Path, dtype: str
) -> None:
    record = build(decoders(dtype, "steered"), tmp_path)
    seen = {constant.name.removeprefix("sarsteer."): constant for constant in record.steering}
    assert {name: constant.consumer for name, constant in seen.items()} == {
        "0.block_output.add.0.vector": "ELEMENTWISE SUM",
        "0.block_output.add.0.nothing": "ELEMENTWISE SUM",
        "1.block_output.add.0.vector": "ELEMENTWISE SUM",
        "1.block_output.add.0.nothing": "ELEMENTWISE SUM",
        "2.block_output.project.0.basis": "MATRIX_MULTIPLY",
        "2.block_output.project.0.basis_scaled": "MATRIX_MULTIPLY",
    }
    for name, constant in seen.items():
        held = "float32" if "basis" in name else dtype
        assert constant.dtype == held
        assert constant.compared is (held != "bfloat16")
        assert constant.consumer_layer.startswith(f"sarsteer.{name.rpartition('.')[0]}")


def test_an_engine_without_a_gpu_is_not_refittable_and_says_why(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_driver(monkeypatch)
    record = build(decoders("float32", "steered"), tmp_path)
    assert record.refit.constants == ()
    assert "no driver in this test" in str(record.refit.reason)


def test_float32_is_computed_in_float32_and_types_are_the_graphs(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 is on by default; a network that is not strongly typed may compute in other types than its graph's."""
    trt: Any = RTX.load()
    seen: list[bool] = []

    def look(_trt: Any, network: Any, config: Any, _monitor: Any) -> None:
        seen.append(config.get_flag(trt.BuilderFlag.TF32))
        seen.append(network.definition.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    monkeypatch.setattr("engines.trt.build._build", look)
    with pytest.raises(EngineError, match="cannot build an engine of"):
        build(decoders("float32", "unsteered"), tmp_path)
    assert seen == [False, True]


def test_a_build_that_fails_as_refittable_succeeds_without(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU said to be here, the builder is asked for refit, and without a driver it really fails."""
    if cuda_driver().problem is None:
        pytest.skip("there is a GPU here")
    gpu = CudaDriver("13.0", (Gpu("Test GPU", "8.9", 1),), None)
    monkeypatch.setattr("engines.trt.build.cuda_driver", lambda: gpu)
    record = build(decoders("float32", "steered"), tmp_path)
    assert record.engine["bytes"] == (tmp_path / "decoder.engine").stat().st_size
    assert record.refit.constants == ()
    assert "could not build it refittable: " in str(record.refit.reason)
    assert "Myelin" in str(record.refit.reason)


def test_steering_constants_and_nothing_else_are_marked_refittable(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT's network itself tells, of every constant in it; again when they were taken back."""
    if cuda_driver().problem is None:
        pytest.skip("there is a GPU here")
    gpu = CudaDriver("13.0", (Gpu("Test GPU", "8.9", 1),), None)
    monkeypatch.setattr("engines.trt.build.cuda_driver", lambda: gpu)
    trt: Any = RTX.load()
    seen: list[tuple[bool, set[str]]] = []

    def look(_trt: Any, network: Any, config: Any, _monitor: Any) -> None:
        layers = [network.definition.get_layer(number) for number in range(network.definition.num_layers)]
        constants = {layer.name for layer in layers if layer.type == trt.LayerType.CONSTANT}
        assert len(constants) > 20
        marked = {name for name in constants if network.definition.are_weights_marked_refittable(name)}
        seen.append((config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL), marked))
        assert not config.get_flag(trt.BuilderFlag.REFIT), "every weight would be refittable"

    monkeypatch.setattr("engines.trt.build._build", look)
    graph = decoders("float32", "steered")
    with pytest.raises(EngineError, match="cannot build an engine of"):
        build(graph, tmp_path)
    steering = {constant.name for constant in engine_source(graph).constants if constant.refittable}
    assert len(steering) == 4  # two vectors; basis and scaled basis; scalars are never refitted
    assert seen == [(True, steering), (False, set())]


def test_one_profile_many_and_none(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    graph = decoders("float32", "steered")
    prefill, decode = derive_profiles(engine_source(graph).inputs, SMALL)
    sizes = []
    for number, profiles in enumerate([(decode,), (prefill, decode)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        record = build(graph, folder, profiles)
        assert record.profiles == profiles
        sizes.append(record.engine["bytes"])
    assert sizes[1] > sizes[0]
    with pytest.raises(EngineError, match="no optimization profile has been defined"):
        build(graph, tmp_path, ())


def test_past_length_0_is_in_range(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    profiles = build(decoders("float32", "steered"), tmp_path).profiles
    assert {profile.shapes["past_key_values.0.key"].min[2] for profile in profiles} == {0}


def test_numeric_strings_are_numbers(exported_decoder: TinyDecoder, tmp_path: Path) -> None:
    """As transformers' exporter writes them: the stream's width is the string '64'."""
    width = exported_decoder.proto.graph.input[0].type.tensor_type.shape.dim[2]
    assert (width.dim_param, width.dim_value) == ("64", 0)
    record = build(exported_decoder.path, tmp_path)
    assert record.inputs[0].dims[2] == 64


def test_compute_capabilities(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    graph = decoders("float32", "unsteered")
    assert build(graph, tmp_path, compute_capabilities=["8.9"]).compute_capabilities == ("8.9",)
    with pytest.raises(UnsupportedError, match=r"9\.0: tensorrt-rtx .* builds for 7\.5, 8\.0"):
        build(graph, tmp_path, compute_capabilities=["9.0"])


def test_a_failed_build_carries_the_lines_of_the_log(
    decoders: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """TensorRT-RTX has no float32 products for Turing: the builder returns nothing."""
    with pytest.raises(EngineError, match=r"cannot build an engine of .*\n.*FP32 GEMM is not supported"):
        build(decoders("float32", "unsteered"), tmp_path, compute_capabilities=["7.5"])
    assert list(tmp_path.iterdir()) == []


def test_profiles_that_tensorrt_refuses(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    """`check_profiles` finds them first; this is what happens without it."""
    graph = decoders("float32", "unsteered")
    prefill, _ = derive_profiles(engine_source(graph).inputs, SMALL)
    embeds = prefill.shapes["inputs_embeds"]
    wrong = ShapeRange(embeds.max, embeds.opt, embeds.min)
    profile = dataclasses.replace(prefill, shapes={**prefill.shapes, "inputs_embeds": wrong})
    with pytest.raises(EngineError, match=r"refuses profile 'prefill'.*MIN<=OPT<=MAX"):
        build(graph, tmp_path, (profile,))


def test_shapes_that_tensorrt_does_not_take(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    """As above; its bindings raise errors of their own for such."""
    graph = decoders("float32", "unsteered")
    prefill, _ = derive_profiles(engine_source(graph).inputs, SMALL)
    embeds = prefill.shapes["inputs_embeds"]
    wrong = ShapeRange(embeds.min, embeds.opt, (2**31, *embeds.max[1:]))
    profile = dataclasses.replace(prefill, shapes={**prefill.shapes, "inputs_embeds": wrong})
    with pytest.raises(
        EngineError, match=r"refuses shapes .*2147483648x8x64 of 'inputs_embeds' in profile 'pref"
    ):
        build(graph, tmp_path, (profile,))


def test_progress_counts_up_to_100_percent(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(decoders("float32", "unsteered"), tmp_path, progress=lambda *report: seen.append(report))
    assert {(stage, total) for stage, _, total in seen} == {("build decoder for tensorrt-rtx", 100)}
    percents = [done for _, done, _ in seen]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    assert len(percents) > 3


def test_an_interrupt_cancels_the_build_and_leaves_nothing(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: the thread that waits is interrupted, and the build must then end by itself."""
    graph, wait = decoders("float32", "unsteered"), threading.Event.wait
    percents: list[int] = []
    interrupted: list[threading.Event] = []

    def interrupting(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout == 0.001 and percents and not interrupted:
            interrupted.append(event)
            raise KeyboardInterrupt
        return wait(event, timeout)

    made: list[Any] = []

    def watched(work: Callable[[], Any], cancel: Callable[[], None] = lambda: None) -> Any:
        return run_interruptibly(lambda: made.append(work()) or made[-1], cancel)

    monkeypatch.setattr("engines.trt.build.run_interruptibly", watched)
    monkeypatch.setattr("engines.trt.worker.threading.Event.wait", interrupting)
    monkeypatch.setattr("engines.trt.worker.POLL_SECONDS", 0.001)
    with pytest.raises(KeyboardInterrupt):
        build(graph, tmp_path, progress=lambda _stage, done, _total: percents.append(done))
    _parsed, engine = made
    assert engine is None, "TensorRT was not told to stop: it built the engine to its end"
    assert 100 not in percents
    assert interrupted[0].is_set(), "the build was not waited for"
    assert list(tmp_path.iterdir()) == []


def test_enterprise_tensorrt_takes_the_same_path_and_needs_a_gpu(
    decoders: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is not installed here; the shared API is TensorRT-RTX's."""
    graph = decoders("float32", "unsteered")
    source = engine_source(graph)
    profiles = derive_profiles(source.inputs, SMALL)
    enterprise = dataclasses.replace(BACKENDS["tensorrt"], module="tensorrt_rtx")
    with pytest.raises(InputError, match="--compute-capability: tensorrt always builds for the GPU"):
        build_engine(
            source,
            tmp_path / "decoder.engine",
            dataclasses.replace(enterprise, builds_without_gpu=True),
            profiles,
            compute_capabilities=["8.9"],
        )
    _no_driver(monkeypatch)
    with pytest.raises(
        UnsupportedError, match=r"tensorrt builds on the kind of GPU .* --engine tensorrt-rtx"
    ):
        build_engine(source, tmp_path / "decoder.engine", enterprise, profiles)


def test_a_graph_of_other_inputs_is_refused(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = engine_source(decoders("float32", "unsteered"))
    wrong = dataclasses.replace(source.inputs[0], dtype="float16")
    altered: EngineSource = dataclasses.replace(source, inputs=(wrong, *source.inputs[1:]))
    with pytest.raises(EngineError, match="reads other inputs than the graph says"):
        build_engine(altered, tmp_path / "x.engine", RTX, derive_profiles(source.inputs, SMALL))


def test_the_sidecar_is_strict_json(decoders: Callable[[str, str], Path], tmp_path: Path) -> None:
    build(decoders("float32", "steered"), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "decoder.json").read_text(), parse_constant=refuse)
    assert content["format"] == "sarsteer-engine"
    assert content["profiles"][0]["shapes"]["inputs_embeds"] == {
        "min": [1, 1, 64],
        "opt": [1, 8, 64],
        "max": [2, 8, 64],
    }


def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "engines.trt.build.cuda_driver", lambda: CudaDriver(None, (), "no driver in this test")
    )
