"""Where there is a GPU, engines are proven by themselves: the whole path, on a stand-in for TensorRT.

The stand-in computes with ONNX Runtime in host memory; that numbers come out right on a GPU it cannot show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from calibration.requests import read_requests
from engines.backends import BACKENDS, Backend
from engines.sidecar import BuildFacts, EngineRecord, NetworkConstant, Profile, Refit, sidecar_of
from engines.trt import opened
from engines.trt.build import EngineSource
from engines.trt.runner import TensorRTDecoder
from graph_passes.onnx_file import read_graph
from sarsteer_export import load_bundle
from sarsteer_export.bundle.manifest import STEERED_DECODER, UNSTEERED_DECODER, Manifest
from tests.engines.trt import stand_in
from tests.sarsteer_export.command_line import answered, answered_json, listing, sarsteer
from tests.sarsteer_export.conftest import Inputs

RTX = ("--engine", "tensorrt-rtx", "--max-batch", "8")


def graph_of(source: EngineSource) -> onnx.ModelProto:
    """The graph that an engine is built from, with all its weights."""
    model = read_graph(source.graph) if source.content is None else onnx.load_from_string(source.content)
    load_external_data_for_model(model, str(source.graph.parent))
    return model


def unsteered_graph(source: EngineSource) -> onnx.ModelProto:
    """What a builder that loses the steering would build."""
    if source.graph.name != STEERED_DECODER.name:
        return graph_of(source)
    return graph_of(dataclasses.replace(source, graph=source.graph.with_name(UNSTEERED_DECODER.name)))


def one_vector_negated(source: EngineSource) -> onnx.ModelProto:
    """What a builder that damages one constant of the shipped engine would build."""
    model = graph_of(source)
    if source.graph.name == STEERED_DECODER.name:
        tensor = next(each for each in model.graph.initializer if each.name.endswith(".vector"))
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[EngineSource], onnx.ModelProto]], None]:
    """A machine on which TensorRT-RTX builds and runs; call it with what its builder makes of a source."""
    row = dataclasses.replace(BACKENDS["tensorrt-rtx"], module=stand_in.__name__, runs_without_gpu=True)
    monkeypatch.setitem(BACKENDS, row.name, row)
    monkeypatch.setattr(stand_in.HostStream, "made", [])
    monkeypatch.setattr(opened, "_open_stream", stand_in.HostStream)
    for kind in (opened.OpenEngine, TensorRTDecoder):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "device", "cpu")

    def builds(engine_of: Callable[[EngineSource], onnx.ModelProto]) -> None:
        def build(
            source: EngineSource, output: Path, backend: Backend, profiles: Sequence[Profile], **_: Any
        ) -> EngineRecord:
            return write_engine(source, engine_of(source), output, backend, profiles)

        monkeypatch.setattr("sarsteer_export.bundle_engines.build_engine", build)
        monkeypatch.setattr("sarsteer_export.parity_runtime.build_engine", build)

    return builds


def write_engine(
    source: EngineSource,
    model: onnx.ModelProto,
    output: Path,
    backend: Backend,
    profiles: Sequence[Profile],
) -> EngineRecord:
    output.write_bytes(stand_in.serialized(model, profiles))
    record = EngineRecord(
        backend=backend.name,
        backend_version=backend.version(),
        compute_capabilities=("8.9",),
        precision=source.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=tuple(profiles),
        graph=source.identity,
        engine={"file": output.name, "bytes": output.stat().st_size, "sha256": "0" * 64},
        plan_sha256=source.plan_sha256,
        steering=tuple(
            NetworkConstant(c.name, str(c.values.dtype), c.values.shape, c.consumer, "", True)
            for c in source.constants
        ),
        refit=Refit((), "not asked for"),
        build=BuildFacts(1.0, 1, 1, 1, "test"),
        warnings=(),
    )
    record.write(sidecar_of(output))
    return record


def test_parity_of_an_engine_runs_by_itself_after_the_build(
    gpu: Callable[..., None], inputs: Inputs, bundle_path: Path, tmp_path: Path
) -> None:
    gpu(graph_of)
    path = tmp_path / "bundle"
    evaluation = ("--eval-harmful", inputs.harmful, "--eval-benign", inputs.benign, "--max-new-tokens", "4")
    evaluation += ("--allow-overlap", "all")
    build = (*inputs.quick_build, *evaluation, "--engine", "tensorrt-rtx", "--max-batch", "2", "-o", path)
    answer = answered_json(sarsteer(*build, "--json"))
    (entry,) = answer["engines"]
    assert (entry["verdict"], entry["reason"]) == ("passed", None)
    manifest = Manifest.read(path)
    report = json.loads((path / manifest.engines[0].report).read_text(encoding="utf-8"))
    assert (report["backend"], report["verdict"]) == ("tensorrt-rtx", "passed")
    controls = [control for case in report["cases"] for control in case["controls"]]
    assert {control["name"] for control in controls} >= {"unsteered", "wrong sign", "wrong layer"}
    assert all(control["caught"] for control in controls)
    compared = {figure["what"] for case in report["cases"] for figure in case["measurements"]}
    assert {"logits effect cosine", "KV max abs, relative"} <= compared
    assert not any("block" in what for what in compared), "an engine ships no block outputs"
    assert {figure["what"] for figure in report["components"]} >= {"prompt embeddings max abs, relative"}
    page = (path / manifest.engines[0].report).with_suffix(".html").read_text(encoding="utf-8")
    assert "tensorrt-rtx" in page

    measured = answer["engine_behaviour"][manifest.engines[0].label]
    assert [(row["requests"], row["system"], row["runtime"], row["count"]) for row in measured["rows"]] == [
        (kind, "steered", runtime, count)
        for kind, count in (("harmful", 6), ("benign", 5))
        for runtime in ("eager", "tensorrt-rtx")
    ]
    assert measured["identical"] == {"steered": 1.0}
    assert json.loads((path / manifest.engines[0].behaviour).read_text(encoding="utf-8")) == measured
    assert manifest.engines[0].behaviour.as_posix() in manifest.files
    again = sarsteer(*build)
    assert "reused: calibrate, engine tensorrt-rtx, export, verify" in answered(again)
    assert answered(again).count(measured["table"]) == 1

    requests = [*read_requests(inputs.harmful), *read_requests(inputs.benign)][:2]
    clips, texts = [request.audio for request in requests], [request.text for request in requests]
    with load_bundle(path) as on_cpu, load_bundle(path, engine="tensorrt-rtx") as on_engine:
        batch = on_engine.generate_batch(clips, texts, max_new_tokens=8)
        assert batch == on_cpu.generate_batch(clips, texts, max_new_tokens=8)
        unsteered = on_cpu.generate_batch(clips, texts, max_new_tokens=8, steering=False)
        assert batch != unsteered, "a decoder that is not steered would pass"
        pieces = list(on_engine.stream(clips[0], texts[0], max_new_tokens=8))
        assert len(pieces) > 1
        assert "".join(pieces) == batch[0] == on_engine.generate(clips[0], texts[0], max_new_tokens=8)

    clip = next(inputs.harmful.parent.glob("*.wav"), None) or next(inputs.harmful.parent.rglob("*.flac"))
    ask = ("run", path, "--audio", clip, "--text", "hello", "--max-new-tokens", "6")
    assert answered(sarsteer(*ask, "--engine", "tensorrt-rtx")) == answered(sarsteer(*ask))
    refusal = sarsteer(*ask, "--engine", "tensorrt-rtx", "--no-steering")
    assert refusal.exit_code == 2
    assert "engine is the steered decoder" in refusal.stderr

    verify = ("verify", path, "--model", inputs.model, "--requests", inputs.harmful, "--prompts", "2")
    again = answered_json(sarsteer(*verify, "--decode-steps", "2", "--engine", "tensorrt-rtx", "--json"))
    assert (again["verdict"], again["backend"]) == ("passed", "tensorrt-rtx")


@pytest.mark.parametrize("wrong", [unsteered_graph, one_vector_negated])
def test_an_engine_that_is_wrong_is_never_written(
    gpu: Callable[..., None],
    inputs: Inputs,
    tmp_path: Path,
    wrong: Callable[[EngineSource], onnx.ModelProto],
) -> None:
    gpu(wrong)
    result = sarsteer(*inputs.quick_build, *RTX, "-o", tmp_path / "bundle")
    assert result.exit_code == 6, result.stderr
    assert "parity of the tensorrt-rtx-1.0.stand-in-float32 engine" in result.stderr
    assert "effect" in result.stderr
    assert listing(tmp_path) == {}
