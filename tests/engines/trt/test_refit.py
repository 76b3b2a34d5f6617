"""Engines refitted: other constants in the same engine, counted by us, or a clear refusal and nothing written.

TensorRT is the stand-in's; that a real engine computes with what was refitted, only a GPU shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.errors import EngineError, InputError, UnsupportedError
from calibration.plan import Add, Positions, Project, Site, SteeringPlan
from engines.backends import BACKENDS
from engines.onnxruntime_runner import OnnxRuntimeDecoder
from engines.sidecar import BuildFacts, EngineRecord, NetworkConstant, Refit, sidecar_of
from engines.trace import Trace, record
from engines.trt import opened
from engines.trt.refit import refit_engine
from engines.trt.runner import TensorRTDecoder
from graph_passes.patch import patch_model
from graph_passes.steering_in import edit_initializers, steering_tensors
from sarsteer_export.engine_build import engine_source
from sarsteer_export.refitting import engine_constants, refit
from tests import tiny_lalm
from tests.conftest import plan_of, random_basis, random_vector
from tests.decoders import TinyDecoder
from tests.engines.trt import stand_in
from tests.engines.trt.cases import ONE_PROFILE, bindings, script, whole
from tests.sarsteer_export.command_line import listing

ROW = dataclasses.replace(
    BACKENDS["tensorrt-rtx"], module=stand_in.__name__, runs_without_gpu=True, targets=("8.9",)
)
Make = Callable[..., Path]


def steering(seed: int, *, strength: float = 0.7, rank: int = 4) -> SteeringPlan:
    """Additions at two blocks and a projection behind the third."""
    return plan_of(
        *(Add(layer, random_vector(tiny_lalm.WIDTH, seed=seed + layer), strength) for layer in range(2)),
        Project(2, random_basis(tiny_lalm.WIDTH, rank, seed=seed), strength=1.2, positions=Positions.ALL),
    )


OLD, NEW = steering(1), steering(50, strength=-1.1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, ROW.name, ROW)
    monkeypatch.setattr(stand_in.HostStream, "made", [])
    monkeypatch.setattr(opened, "_open_stream", stand_in.HostStream)
    for kind in (opened.OpenEngine, TensorRTDecoder):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "device", "cpu")
    monkeypatch.setitem(refit_engine.__kwdefaults__, "device", "cpu")


@pytest.fixture
def engine(dynamo_decoder: TinyDecoder, tmp_path: Path) -> Make:
    """A refittable engine of the tiny decoder steered by `OLD`, alone in a folder."""

    def make(
        plan: SteeringPlan = OLD,
        *,
        counted: Callable[[list[str]], list[str]] = list,
        reason: str | None = None,
        **faults: Any,
    ) -> Path:
        model = whole(dynamo_decoder, plan)
        held = edit_initializers(model)
        names = list(steering_tensors(model))
        folder = tmp_path / "engine"
        folder.mkdir()
        path = folder / "tiny.engine"
        path.write_bytes(stand_in.serialized(model, ONE_PROFILE, refit=counted(names), **faults))
        (tmp_path / "source").mkdir()
        graph = tmp_path / "source" / "tiny.onnx"
        onnx.save(model, graph)
        source = engine_source(graph)
        EngineRecord(
            backend=ROW.name,
            backend_version=ROW.version(),
            compute_capabilities=("8.9",),
            precision="float32",
            inputs=bindings(list(model.graph.input)),
            outputs=bindings(list(model.graph.output)),
            profiles=ONE_PROFILE,
            graph=source.identity,
            engine={"file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64},
            plan_sha256=plan.digest(),
            steering=tuple(
                NetworkConstant(c.name, c.values.dtype.name, c.values.shape, c.consumer, "", True)
                for c in source.constants
            ),
            refit=Refit(() if reason else tuple(names), reason),
            build=BuildFacts(1.0, 1, 1, 1, "test"),
            warnings=(),
        ).write(sidecar_of(path))
        assert {c.name for c in source.constants} == set(held)
        return path

    return make


def trace_of(path: Path) -> Trace:
    with TensorRTDecoder(path, backend=ROW) as decoder:
        return record(decoder, script())


def expected(decoder: TinyDecoder, plan: SteeringPlan) -> Trace:
    with OnnxRuntimeDecoder(whole(decoder, plan).SerializeToString()) as runner:
        return record(runner, script())


def logits(trace: Trace) -> np.ndarray:
    return np.concatenate([step["logits"].ravel() for step in trace.steps])


def test_a_refitted_engine_does_what_one_of_the_new_plan_does(
    engine: Make, dynamo_decoder: TinyDecoder, tmp_path: Path
) -> None:
    old = engine()
    before = listing(old.parent)
    result = refit(old, NEW, tmp_path / "new" / "tiny.engine")
    assert listing(old.parent) == before
    assert result.plan_sha256 == NEW.digest()
    np.testing.assert_array_equal(logits(trace_of(result.output)), logits(expected(dynamo_decoder, NEW)))
    assert not np.array_equal(logits(trace_of(old)), logits(trace_of(result.output)))
    sidecar, earlier = (EngineRecord.read(sidecar_of(path)) for path in (result.output, old))
    content = result.output.read_bytes()
    assert sidecar.engine == {
        "file": "tiny.engine",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert sidecar.plan_sha256 == NEW.digest()
    same = {"engine": earlier.engine, "plan_sha256": earlier.plan_sha256}
    assert dataclasses.replace(sidecar, **same) == earlier


def test_in_place_and_again(engine: Make, dynamo_decoder: TinyDecoder) -> None:
    path = engine()
    refit(path, NEW)
    refit(path, OLD)
    np.testing.assert_array_equal(logits(trace_of(path)), logits(expected(dynamo_decoder, OLD)))
    assert set(listing(path.parent)) == {"tiny.engine", "tiny.json"}


@pytest.mark.parametrize(
    ("counted", "named"),
    [
        (lambda names: [*names, "model.lm_head.weight"], "model.lm_head.weight"),
        (lambda names: names[1:], "sarsteer.0.block_output.add.0.vector"),
        (lambda names: [], "sarsteer"),
    ],
)
def test_tensorrt_must_count_the_weights_that_we_count(
    engine: Make, counted: Callable[[list[str]], list[str]], named: str
) -> None:
    path = engine(counted=counted)
    before = listing(path.parent)
    with pytest.raises(EngineError, match=f"TensorRT would refit .* weights, the plan has 4.*{named}"):
        refit(path, NEW)
    assert listing(path.parent) == before


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"missing": "blocks.0.weight"}, r"also wants 'blocks\.0\.weight'"),
        ({"fails": True}, "failed to refit the engine: refit failed"),
    ],
)
def test_tensorrt_that_refuses(engine: Make, faults: dict[str, Any], why: str) -> None:
    path = engine(**faults)
    before = listing(path.parent)
    with pytest.raises(EngineError, match=why):
        refit(path, NEW)
    assert listing(path.parent) == before


def test_an_engine_that_was_not_built_to_be_refitted(engine: Make, tmp_path: Path) -> None:
    path = engine(reason="there was no driver")
    with pytest.raises(UnsupportedError, match=r"is not refittable: there was no driver; build it again"):
        refit(path, NEW, tmp_path / "new" / "tiny.engine")
    assert not (tmp_path / "new").exists()


LAST = {"strength": 1.0, "positions": Positions.LAST}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (plan_of(*OLD.edits[:2]), r"2\.block_output\.project\.0\.basis.* of the engine alone"),
        (
            plan_of(*OLD.edits, Add(2, random_vector(tiny_lalm.WIDTH, seed=9))),
            r"2\.block_output\.add\.0.* of the plan alone",
        ),
        (
            plan_of(*OLD.edits[:2], dataclasses.replace(OLD.edits[2], positions=Positions.LAST)),
            r"project\.0\.nothing.* of the plan alone",
        ),
        (
            plan_of(dataclasses.replace(OLD.edits[0], positions=Positions.ALL), *OLD.edits[1:]),
            r"add\.0\.nothing.* of the engine alone",
        ),
        (steering(1, rank=3), r"'sarsteer.2.block_output.project.0.basis' is float32 \(64, 4\)"),
        (
            plan_of(*OLD.edits[:2], dataclasses.replace(OLD.edits[2], site=Site.BLOCK_INPUT)),
            "alone: they have other edits",
        ),
        (
            SteeringPlan(tiny_lalm.WIDTH * 2, tiny_lalm.LAYERS, (Add(0, random_vector(128, seed=0)),)),
            "the plan is for width 128; this decoder's width is 64",
        ),
    ],
)
def test_a_plan_of_other_edits(engine: Make, plan: SteeringPlan, why: str) -> None:
    path = engine()
    before = listing(path.parent)
    with pytest.raises(InputError, match=why):
        refit(path, plan)
    assert listing(path.parent) == before


def test_a_plan_whose_edits_act_in_another_order(engine: Make) -> None:
    """An addition and a projection of one tensor do not commute, and have the same constants either way."""
    add = Add(1, random_vector(tiny_lalm.WIDTH, seed=3))
    project = Project(1, random_basis(tiny_lalm.WIDTH, 4, seed=4))
    path = engine(plan_of(add, project))
    with pytest.raises(InputError, match="act on one tensor in another order"):
        refit(path, plan_of(project, add))
    refit(path, plan_of(dataclasses.replace(add, strength=2.0), project))


def test_a_plan_for_another_model_needs_force(engine: Make) -> None:
    path = engine()
    sidecar = EngineRecord.read(sidecar_of(path))
    dataclasses.replace(sidecar, graph=sidecar.graph | {"model_fingerprint": "a" * 64}).write(
        sidecar_of(path)
    )
    foreign = dataclasses.replace(NEW, provenance={"model_fingerprint": "b" * 64})
    with pytest.raises(InputError, match="made for another model"):
        refit(path, foreign)
    refit(path, foreign, force=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "edits",
    [
        (Add(0, random_vector(tiny_lalm.WIDTH, seed=0), 0.3),),
        (Add(0, random_vector(tiny_lalm.WIDTH, seed=0), 0.0, positions=Positions.ALL),),
        (Project(1, random_basis(tiny_lalm.WIDTH, 2, seed=1), random_vector(tiny_lalm.WIDTH, seed=2)),),
        (
            Add(1, random_vector(tiny_lalm.WIDTH, seed=0), site=Site.BLOCK_INPUT),
            Add(0, random_vector(tiny_lalm.WIDTH, seed=1)),
            Add(0, random_vector(tiny_lalm.WIDTH, seed=2)),
            Add(2, random_vector(tiny_lalm.WIDTH, seed=3), site=Site.FINAL_NORM_OUTPUT),
        ),
    ],
)
def test_the_constants_are_those_of_a_graph_of_the_plan(
    dynamo_decoder: TinyDecoder, edits: tuple[Any, ...], dtype: str
) -> None:
    """Read off a sidecar alone, in every dtype of the stream, they are what patching would write."""
    plan = plan_of(*edits)
    tensors = edit_initializers(patch_model(dynamo_decoder.proto, plan).model)
    held = {
        name: NetworkConstant(
            name, "float32" if "project" in name and "nothing" not in name else dtype, (), "", "", True
        )
        for name in tensors
    }
    sidecar = EngineRecord(
        *("tensorrt-rtx", "1", (), dtype, (), (), (), {}, {}, None),
        tuple(held.values()),
        Refit((), None),
        BuildFacts(1.0, 1, 1, 1, "test"),
        (),
    )
    constants = engine_constants(sidecar, plan)
    assert set(constants) == {name for name, tensor in tensors.items() if tensor.dims}
    for name, values in constants.items():
        wanted = onnx.numpy_helper.to_array(tensors[name])
        assert values.dtype.name == held[name].dtype
        np.testing.assert_array_equal(values, wanted.astype(values.dtype))
