"""The engines of a bundle, step by step: built from its graphs, proven by `prove_engine`, or honestly not.

Where an engine runs here TensorRT is the stand-in, which computes with ONNX Runtime; where one is only built, the
builder is the real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm
from calibration.plan import SteeringPlan
from calibration.requests import read_requests
from engines.backends import BACKENDS, Backend, find_backend
from engines.cuda_driver import cuda_driver
from engines.report import ParityReport, Verdict
from engines.sidecar import EngineRecord, Profile, sidecar_of
from engines.trt import opened
from engines.trt.build import EngineSource
from engines.trt.runner import TensorRTDecoder
from graph_passes.onnx_file import read_graph
from graph_passes.patch import patch_model
from sarsteer_export.bundle.manifest import (
    COMPONENTS,
    DECODER,
    EMBEDDING,
    ENCODER,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    EngineEntry,
    Manifest,
)
from sarsteer_export.bundle_engines import add_engine, check_engines, prove_engine
from sarsteer_export.engine_build import EngineSettings
from sarsteer_export.parity_run import ParityRun, ParitySettings, parity_requests
from sarsteer_export.parity_runtime import TensorRTParity
from sarsteer_export.report_page import parity_page
from tests.engines.trt import stand_in
from tests.sarsteer_export.conftest import Inputs
from tests.sarsteer_export.test_engine_parity import graph_of, write_engine

PROMPTS = 2
SETTINGS = EngineSettings(("tensorrt-rtx",), max_batch=PROMPTS, max_prompt=256, max_total=512)
"""No row more than parity needs."""
Damage = Callable[[onnx.ModelProto], None]
Built = list[tuple[EngineSource, Path, tuple[Profile, ...], dict[str, Any]]]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Built:
    """A machine on which TensorRT-RTX builds and runs; everything it builds is noted."""
    row = dataclasses.replace(BACKENDS["tensorrt-rtx"], module=stand_in.__name__, runs_without_gpu=True)
    monkeypatch.setitem(BACKENDS, row.name, row)
    monkeypatch.setattr(stand_in.HostStream, "made", [])
    monkeypatch.setattr(opened, "_open_stream", stand_in.HostStream)
    for kind in (opened.OpenEngine, TensorRTDecoder):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "device", "cpu")
    noted: Built = []

    def build(
        source: EngineSource, output: Path, backend: Backend, profiles: Sequence[Profile], **options: Any
    ) -> EngineRecord:
        noted.append((source, output, tuple(profiles), options))
        return write_engine(source, graph_of(source), output, backend, profiles)

    monkeypatch.setattr("sarsteer_export.bundle_engines.build_engine", build)
    monkeypatch.setattr("sarsteer_export.parity_runtime.build_engine", build)
    return noted


@pytest.fixture
def run(lalm: Lalm, plan: SteeringPlan, inputs: Inputs) -> ParityRun:
    """Parity on the CPU, as `build` and `verify` hand it over."""
    chosen = parity_requests(read_requests(inputs.harmful), read_requests(inputs.benign), count=PROMPTS)
    return ParityRun(lalm, plan, chosen, ParitySettings(prompts=PROMPTS, decode_steps=2))


def with_engine(folder: Path, settings: EngineSettings = SETTINGS) -> EngineEntry:
    """Build the engine and enter it into the manifest."""
    (backend,) = settings.backends
    entry = add_engine(folder, backend, settings)
    dataclasses.replace(Manifest.read(folder), engines=(entry,), files={}).write(folder)
    return entry


def rebuilt(folder: Path, entry: EngineEntry, component: str, damage: Damage) -> None:
    """The engine of a component again, of a graph that was damaged on the way."""
    engine = folder / entry.components[component]
    blob = engine.read_bytes().removeprefix(stand_in.MAGIC)
    header, _, content = blob.partition(b"\n")
    model = onnx.load_from_string(content)
    damage(model)
    engine.write_bytes(b"".join([stand_in.MAGIC, header, b"\n", model.SerializeToString()]))
    record = EngineRecord.read(sidecar_of(engine))
    size = {"bytes": engine.stat().st_size}
    dataclasses.replace(record, engine=record.engine | size).write(sidecar_of(engine))


def failed(report: ParityReport) -> str:
    assert report.verdict is Verdict.FAILED
    return "\n".join(report.failures())


def test_every_graph_becomes_an_engine(builds: Built, bundle_copy: Path) -> None:
    entry = with_engine(bundle_copy)
    assert (entry.verdict, entry.reason, entry.precision) == (None, None, "float32")
    assert [source.graph for source, *_ in builds] == [bundle_copy / file for file in COMPONENTS.values()]
    assert [output for _, output, *_ in builds] == [bundle_copy / file for file in entry.components.values()]
    profiles = [[profile.name for profile in profiles] for _, _, profiles, _ in builds]
    assert profiles == [["prefill", "decode"], ["default"], ["default"]]
    assert Manifest.read(bundle_copy).engine("tensorrt-rtx") == entry


def test_an_engine_is_proven_in_what_it_ships(builds: Built, run: ParityRun, bundle_copy: Path) -> None:
    """As many rows as parity has prompts are enough; each control is an engine, and thrown away."""
    entry = with_engine(bundle_copy)
    shipped = len(builds)
    proven, report = prove_engine(run, bundle_copy, entry)
    assert proven == dataclasses.replace(entry, verdict="passed")
    assert (report.verdict, report.backend, report.precision) == (Verdict.PASSED, "tensorrt-rtx", "float32")
    assert report.context["settings"]["blocks"] is False
    controls = [control for case in report.cases for control in case.controls]
    engines = [name for name in (control.name for control in controls) if name != "unsteered"]
    made = builds[shipped:]
    assert len(made) == len(report.cases) + len(engines), (
        "one of the unsteered graph per case, one per control"
    )
    like = EngineRecord.read(sidecar_of(bundle_copy / entry.components[DECODER]))
    for source, output, profiles, options in made:
        assert source.content is not None
        assert profiles == like.profiles
        assert options["compute_capabilities"] in ((), like.compute_capabilities)
        assert not output.parent.exists()
    unsteered = [source for source, *_ in made if not source.constants]
    assert len(unsteered) == len(report.cases)
    assert [note.partition(":")[0] for note in report.notes] == ["greedy rollouts, steered"]
    assert parity_page(report.to_json())
    assert run.settings.blocks
    assert run.runtime is None


def scaled(factor: float, suffix: str = "") -> Damage:
    """Multiply the first float constant that has more than one dimension, or the one of a name."""

    def damage(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if (
                tensor.name.endswith(suffix)
                and values.dtype == np.float32
                and values.ndim > (0 if suffix else 1)
            ):
                tensor.CopyFrom(numpy_helper.from_array(np.float32(factor) * values, tensor.name))
                return
        raise AssertionError(f"nothing ends in {suffix!r}")

    return damage


@pytest.mark.parametrize(
    ("component", "damage", "figure"),
    [
        (DECODER, scaled(0.5, "block_output.add.0.vector"), "effect"),
        (DECODER, scaled(1.5), "logits max abs"),
        (ENCODER, scaled(1.5), "prompt embeddings max abs"),
        (EMBEDDING, scaled(1.5), "prompt embeddings max abs"),
    ],
)
def test_a_component_that_is_wrong_fails(
    builds: Built, run: ParityRun, bundle_copy: Path, component: str, damage: Damage, figure: str
) -> None:
    entry = with_engine(bundle_copy)
    rebuilt(bundle_copy, entry, component, damage)
    proven, report = prove_engine(run, bundle_copy, entry)
    assert figure in failed(report)
    assert (proven.verdict, proven.reason) == ("failed", None)


def test_the_engine_of_another_plan_fails(
    builds: Built, run: ParityRun, bundle_copy: Path, plan: SteeringPlan
) -> None:
    """A plan that differs from the oracle's in one edit's strength."""
    first, *rest = plan.edits
    other = dataclasses.replace(
        plan, edits=(dataclasses.replace(first, strength=first.strength * 1.1), *rest)
    )
    patched = patch_model(read_graph(bundle_copy / UNSTEERED_DECODER), other)
    onnx.save(patched.model, bundle_copy / STEERED_DECODER)
    entry = with_engine(bundle_copy)
    assert "effect" in failed(prove_engine(run, bundle_copy, entry)[1])


def test_an_engine_that_cannot_be_run_is_never_called_passed(
    run: ParityRun, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, builds: Built
) -> None:
    """Nothing is opened or built, and the report says why."""
    entry = with_engine(bundle_copy)
    shipped = len(builds)

    def refuse(_backend: Backend) -> None:
        raise UnsupportedError("the card is in the drawer")

    monkeypatch.setattr("sarsteer_export.bundle_engines.check_can_run", refuse)
    proven, report = prove_engine(run, bundle_copy, entry)
    assert report.verdict is Verdict.NOT_EXECUTED
    assert proven.verdict == "built, not executed"
    assert proven.reason == "the card is in the drawer"
    assert report.cases == report.components == ()
    assert "the card is in the drawer" in parity_page(report.to_json())
    assert len(builds) == shipped


def test_the_unsteered_decoder_may_lie_elsewhere(
    builds: Built, run: ParityRun, bundle_copy: Path, decoder_copy: Path
) -> None:
    """`verify` exports it again where the bundle does not keep it."""
    entry = with_engine(bundle_copy)
    (bundle_copy / UNSTEERED_DECODER).unlink()
    proven, _ = prove_engine(run, bundle_copy, entry, decoder_copy)
    assert proven.verdict == "passed"


def test_more_rows_than_the_engine_admits(builds: Built, run: ParityRun, bundle_copy: Path) -> None:
    """`build` sees it before any work; `verify` may ask for more than `build` did."""
    one_row = dataclasses.replace(SETTINGS, max_batch=1)
    entry = with_engine(bundle_copy, one_row)
    with pytest.raises(InputError, match=r"no profile of the engine admits these shapes.*--max-batch"):
        prove_engine(run, bundle_copy, entry)


def test_what_could_not_be_proven_is_refused_before_it_is_built(builds: Built) -> None:
    check_engines(SETTINGS, "bfloat16")
    with pytest.raises(UnsupportedError, match="no parity limits for onnxruntime-cuda/bfloat16"):
        check_engines(EngineSettings(("onnxruntime-cuda",)), "bfloat16")
    check_engines(EngineSettings(), "float32")


def test_nothing_is_built_for_an_execution_provider(builds: Built, run: ParityRun, bundle_copy: Path) -> None:
    """It runs the bundle's graphs, blocks and unsteered decoder included."""
    entry = with_engine(bundle_copy, EngineSettings(("onnxruntime-cuda",)))
    assert builds == []
    assert entry.components == {name: file.as_posix() for name, file in COMPONENTS.items()}


def test_an_execution_provider_is_proven_with_its_blocks(
    run: ParityRun, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that computes on the CPU stands for one of a GPU."""
    row = dataclasses.replace(
        find_backend("onnxruntime-cuda"),
        provider="CPUExecutionProvider",
        provider_options=(),
        runs_without_gpu=True,
    )
    monkeypatch.setitem(BACKENDS, row.name, row)
    entry = with_engine(bundle_copy, EngineSettings(("onnxruntime-cuda",)))
    proven, report = prove_engine(run, bundle_copy, entry)
    assert (proven.verdict, report.backend) == ("passed", "onnxruntime-cuda")
    assert any("block" in figure.what for case in report.cases for figure in case.measurements)
    assert [note.partition(":")[0] for note in report.notes] == [
        "greedy rollouts, unsteered",
        "greedy rollouts, steered",
    ]


# --- graphs in memory, by the real builder -------------------------------------------------------------------------


@pytest.mark.skipif(
    cuda_driver().problem is None, reason="this machine has a GPU, on which tests marked gpu run"
)
@pytest.mark.parametrize("targets", [(), ("8.9",)])
def test_a_control_is_built_by_tensorrt_like_the_engine_that_is_shipped(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...]
) -> None:
    """A graph that is no file, its weights beside the bundle's graphs; only running it is left out."""
    seen: list[tuple[EngineRecord, int]] = []

    @contextmanager
    def read(engine: Path, _backend: Backend) -> Iterator[None]:
        seen.append((EngineRecord.read(sidecar_of(engine)), engine.stat().st_size))
        yield

    monkeypatch.setattr("sarsteer_export.parity_runtime.open_decoder", read)
    settings = dataclasses.replace(SETTINGS, compute_capabilities=targets)
    entry = with_engine(bundle_copy, settings)
    like = EngineRecord.read(sidecar_of(bundle_copy / entry.components[DECODER]))
    assert like.steering
    unsteered = read_graph(bundle_copy / UNSTEERED_DECODER)
    plan = SteeringPlan.load(bundle_copy / PLAN)
    parity = TensorRTParity(find_backend("tensorrt-rtx"), like)
    for graph in (unsteered, patch_model(unsteered, plan).model):
        with parity.graph(graph, (bundle_copy / UNSTEERED_DECODER).parent):
            pass
    (control, _), (again, size) = seen
    for record in (control, again):
        assert (record.profiles, record.compute_capabilities) == (like.profiles, like.compute_capabilities)
        assert (record.inputs, record.outputs, record.precision) == (
            like.inputs,
            like.outputs,
            like.precision,
        )
    assert control.steering == ()
    assert again.steering == like.steering
    assert (again.build.layers, again.engine["bytes"]) == (like.build.layers, size)


def test_what_only_shows_when_an_engine_is_opened_is_not_executed_either(
    builds: Built, run: ParityRun, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries of a provider that are missing, or a GPU that the engine was not built for."""
    entry = with_engine(bundle_copy)

    def refuse(*_: Any) -> None:
        raise UnsupportedError("libcudnn is missing")

    monkeypatch.setattr("sarsteer_export.bundle.bundle.open_graph", refuse)
    proven, report = prove_engine(run, bundle_copy, entry)
    assert (proven.verdict, proven.reason) == ("built, not executed", "libcudnn is missing")
    assert report.verdict is Verdict.NOT_EXECUTED
