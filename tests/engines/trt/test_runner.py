"""Engines run as the ONNX graph does, in the right profile, with the cache on the device, or refuse clearly.

TensorRT itself is the stand-in's; what it cannot show needs a GPU and is in `test_runner_gpu.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from calibration.errors import EngineError, InputError, SarsteerError, UnsupportedError
from engines.backends import BACKENDS, Backend, Runtime
from engines.cuda_driver import CudaDriver, Gpu, cuda_driver
from engines.onnxruntime_runner import OnnxRuntimeDecoder
from engines.sidecar import Binding, BuildFacts, EngineRecord, Profile, Refit, ShapeRange, sidecar_of
from engines.torch_arrays import to_host
from engines.trace import Trace, record
from engines.trt import opened
from engines.trt.api import log_of
from engines.trt.device import TORCH_DTYPES, address, allocate, fill
from engines.trt.runner import TensorRTDecoder, TensorRTRunner, check_torch_cuda
from tests.decoders import TinyDecoder
from tests.engines.graphs import WIDTH, decoder_graph
from tests.engines.trt import stand_in
from tests.engines.trt.cases import (
    ONE_PROFILE,
    PLAN,
    PREFILL,
    STEPS,
    TWO_PROFILES,
    bindings,
    decoder_profile,
    script,
    whole,
)

BACKEND = Backend("stand-in", Runtime.TENSORRT, stand_in.__name__, "nothing")
EMBEDS = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
PAST = np.random.default_rng(1).standard_normal((2, 1, 2, WIDTH)).astype(np.float32)
HAND = (
    Profile(
        "hand",
        {
            "inputs_embeds": ShapeRange((1, 1, WIDTH), (2, 3, WIDTH), (2, 4, WIDTH)),
            "past_key_values.0.key": ShapeRange((1, 1, 0, WIDTH), (2, 1, 2, WIDTH), (2, 1, 9, WIDTH)),
        },
    ),
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of host memory."""
    monkeypatch.setattr(stand_in.HostStream, "made", [])
    monkeypatch.setattr(opened, "_open_stream", stand_in.HostStream)


@pytest.fixture
def can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which engines run."""
    monkeypatch.setattr(opened, "check_can_run", lambda backend: None)


def write_engine(
    folder: Path,
    model: onnx.ModelProto,
    profiles: Sequence[Profile],
    *,
    backend: Backend = BACKEND,
    **faults: Any,
) -> Path:
    """An engine of the stand-in and its sidecar."""
    path = folder / "tiny.engine"
    path.write_bytes(stand_in.serialized(model, profiles, **faults))
    EngineRecord(
        backend=backend.name,
        backend_version=backend.version(),
        compute_capabilities=("8.9",),
        precision="float32",
        inputs=bindings(list(model.graph.input)),
        outputs=bindings(list(model.graph.output)),
        profiles=tuple(profiles),
        graph={},
        engine={"file": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64},
        plan_sha256=None,
        steering=(),
        refit=Refit((), "not asked for"),
        build=BuildFacts(1.0, 1, 1, 1, "test"),
        warnings=(),
    ).write(sidecar_of(path))
    return path


def rewrite(path: Path, **changes: Any) -> None:
    """Replace fields of an engine's sidecar."""
    dataclasses.replace(EngineRecord.read(sidecar_of(path)), **changes).write(sidecar_of(path))


def decoder_of(path: Path) -> TensorRTDecoder:
    return TensorRTDecoder(path, backend=BACKEND, device="cpu")


def hand_decoder(folder: Path, **faults: Any) -> TensorRTDecoder:
    return decoder_of(write_engine(folder, decoder_graph(), HAND, **faults))


def hand_runner(folder: Path, **faults: Any) -> TensorRTRunner:
    path = write_engine(folder, decoder_graph(), HAND, **faults)
    return TensorRTRunner(path, backend=BACKEND, device="cpu")


def assert_same(seen: Trace, expected: Trace) -> None:
    for mine, theirs in [*zip(seen.steps, expected.steps, strict=True), (seen.cache, expected.cache)]:
        assert list(mine) == list(theirs)
        for name, array in theirs.items():
            assert mine[name].dtype == array.dtype
            np.testing.assert_array_equal(mine[name], array, err_msg=name)


@pytest.mark.usefixtures("can_run")
@pytest.mark.parametrize("plan", [None, PLAN], ids=["unsteered", "steered"])
@pytest.mark.parametrize("profiles", [ONE_PROFILE, TWO_PROFILES], ids=["one profile", "two profiles"])
def test_an_engine_does_what_onnx_runtime_does_to_the_bit(
    plan: Any, profiles: Sequence[Profile], dynamo_decoder: TinyDecoder, tmp_path: Path
) -> None:
    model = whole(dynamo_decoder, plan)
    with OnnxRuntimeDecoder(model.SerializeToString()) as runner:
        expected = record(runner, script())
    with decoder_of(write_engine(tmp_path, model, profiles)) as decoder:
        seen = record(decoder, script())
        assert_same(seen, expected)
        assert_same(record(decoder, script()), expected)  # again, after the reset that a script begins with
    assert [step["logits"].shape[1] for step in seen.steps] == [PREFILL, *[1] * STEPS]
    assert {array.shape[2] for array in seen.cache.values()} == {PREFILL + STEPS}


@pytest.mark.usefixtures("can_run")
def test_steering_is_seen_in_the_traces(dynamo_decoder: TinyDecoder, tmp_path: Path) -> None:
    traces = []
    for plan in (None, PLAN):
        with decoder_of(write_engine(tmp_path, whole(dynamo_decoder, plan), ONE_PROFILE)) as decoder:
            traces.append(record(decoder, script()))
    for before, after in zip(traces[0].steps, traces[1].steps, strict=True):
        assert np.abs(before["logits"] - after["logits"]).max() > 0.1


@pytest.mark.usefixtures("can_run")
def test_every_step_runs_in_the_tightest_profile_with_one_context_each(
    dynamo_decoder: TinyDecoder, tmp_path: Path
) -> None:
    everything = decoder_profile("all", (1, 8), (0, 8))
    engine = write_engine(tmp_path, whole(dynamo_decoder), (everything, *TWO_PROFILES))
    with decoder_of(engine) as decoder:
        assert stand_in.Runtime.opened.contexts == []
        record(decoder, script())
        record(decoder, script())
    assert [(context.profile, len(context.runs)) for context in stand_in.Runtime.opened.contexts] == [
        (1, 2),
        (2, 2 * STEPS),
    ]


@pytest.mark.usefixtures("can_run")
def test_the_cache_is_handed_on_by_address_and_never_passes_through_the_host(
    dynamo_decoder: TinyDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[str, tuple[int, ...]]] = []

    def note(function: Callable[..., Any], way: str) -> Callable[..., Any]:
        def noted(tensor: torch.Tensor, *rest: Any) -> Any:
            copied.append((way, tuple(tensor.shape)))
            return function(tensor, *rest)

        return noted

    monkeypatch.setattr("engines.trt.runner.fill", note(fill, "in"))
    monkeypatch.setattr("engines.trt.runner.to_host", note(to_host, "out"))
    with decoder_of(write_engine(tmp_path, whole(dynamo_decoder), ONE_PROFILE)) as decoder:
        for feeds in script().steps:
            decoder.step(feeds)
    runs = stand_in.Runtime.opened.contexts[0].runs
    assert len(runs) == 1 + STEPS
    for before, after in itertools.pairwise(runs):
        for name in before:
            if name.startswith("past_key_values."):
                assert after[name] == before[name.replace("past_key_values.", "present.")]
    assert len(copied) == (3 + 1) * (1 + STEPS)  # three inputs, and the logits
    assert all(len(shape) < 4 for _, shape in copied)


@pytest.mark.usefixtures("can_run")
def test_an_empty_past_has_addresses_of_its_own(tmp_path: Path) -> None:
    with hand_decoder(tmp_path) as decoder:
        decoder.step({"inputs_embeds": EMBEDS})
    context = stand_in.Runtime.opened.contexts[0]
    assert context.shapes["past_key_values.0.key"] == (2, 1, 0, WIDTH)
    assert 0 not in context.runs[0].values()
    assert len(set(context.runs[0].values())) == 4


@pytest.mark.usefixtures("can_run")
def test_a_decoder_forgets_its_cache_when_it_is_reset_and_when_it_is_closed(tmp_path: Path) -> None:
    decoder = hand_decoder(tmp_path)
    for _ in range(2):
        with decoder:
            assert decoder.cache() == {}
            first = decoder.step({"inputs_embeds": EMBEDS})["logits"]
            assert decoder.cache()["present.0.key"].shape == (2, 1, 3, WIDTH)
            assert not np.array_equal(decoder.step({"inputs_embeds": EMBEDS * 2})["logits"], first)
            decoder.reset()
            np.testing.assert_array_equal(decoder.step({"inputs_embeds": EMBEDS})["logits"], first)


@pytest.mark.usefixtures("can_run")
def test_a_cache_that_was_taken_is_a_copy(tmp_path: Path) -> None:
    with hand_decoder(tmp_path) as decoder:
        decoder.step({"inputs_embeds": EMBEDS})
        taken = decoder.cache()["present.0.key"]
        np.testing.assert_array_equal(taken[:, 0], EMBEDS)
        taken[:] = 7
        np.testing.assert_array_equal(decoder.cache()["present.0.key"][:, 0], EMBEDS)


@pytest.mark.usefixtures("can_run")
def test_a_step_that_is_refused_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    with hand_decoder(tmp_path) as decoder:
        decoder.step({"inputs_embeds": EMBEDS})
        with pytest.raises(InputError, match=r"inputs_embeds"):
            decoder.step({"inputs_embeds": np.zeros((2, 5, WIDTH), np.float32)})
        with pytest.raises(InputError, match=r"batch 2 and the step of batch 1; reset"):
            decoder.step({"inputs_embeds": EMBEDS[:1]})
        np.testing.assert_array_equal(decoder.cache()["present.0.key"][:, 0], EMBEDS)
        decoder.reset()
        decoder.step({"inputs_embeds": EMBEDS[:1]})


@pytest.mark.usefixtures("can_run")
@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "'inputs_embeds' is missing"),
        ({"inputs_embeds": EMBEDS.astype(np.float16)}, "is float16; expected float32"),
        ({"inputs_embeds": EMBEDS[..., :3]}, "expected 4"),
        ({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST}, "'past_key_values.0.key' is unknown"),
        ({"inputs_embeds": np.zeros((3, 1, WIDTH), np.float32)}, "inputs_embeds"),
    ],
)
def test_wrong_inputs_of_a_step_are_refused(feeds: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    with hand_decoder(tmp_path) as decoder:
        with pytest.raises(InputError) as error:
            decoder.step(feeds)
        assert words in str(error.value)
        assert all(context.runs == [] for context in stand_in.Runtime.opened.contexts)


@pytest.mark.usefixtures("can_run")
def test_a_closed_runner_refuses_to_run(tmp_path: Path) -> None:
    decoder, runner = hand_decoder(tmp_path), hand_runner(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: decoder.step({"inputs_embeds": EMBEDS}),
        decoder.cache,
        lambda: runner.run({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST}),
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(RuntimeError, match="closed"):
                call()
        with decoder, runner:
            for call in calls:
                call()


@pytest.mark.usefixtures("can_run")
def test_a_run_that_tensorrt_refuses_carries_its_own_lines(tmp_path: Path) -> None:
    words = r"failed to run the engine: the card has caught fire$"
    log_of(BACKEND).log(stand_in.ILogger.Severity.ERROR, "a line of earlier work")
    with hand_decoder(tmp_path, fails=True) as decoder, pytest.raises(EngineError, match=words):
        decoder.step({"inputs_embeds": EMBEDS})
    with hand_runner(tmp_path, fails=True) as runner, pytest.raises(EngineError, match=words):
        runner.run({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST})


@pytest.mark.usefixtures("can_run")
def test_what_cuda_reports_is_one_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(stream: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand a page about it")

    with hand_decoder(tmp_path) as decoder:
        monkeypatch.setattr(stand_in.HostStream, "synchronize", fault)
        with pytest.raises(EngineError, match=r"stand-in failed on cpu: CUDA out of memory$"):
            decoder.step({"inputs_embeds": EMBEDS})


def expected_of(embeds_BSD: np.ndarray, past_BHPD: np.ndarray) -> np.ndarray:
    cache_BTD = np.concatenate([past_BHPD[:, 0], embeds_BSD], axis=1)
    matrix = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH) / 10
    return (embeds_BSD + cache_BTD.mean(axis=1, keepdims=True)) @ matrix


def check_run(runner: TensorRTRunner, embeds_BSD: np.ndarray, past_BHPD: np.ndarray = PAST) -> None:
    outputs = runner.run({"past_key_values.0.key": past_BHPD, "inputs_embeds": embeds_BSD})
    assert list(outputs) == ["logits", "present.0.key"]
    np.testing.assert_allclose(outputs["logits"], expected_of(embeds_BSD, past_BHPD), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("can_run")
def test_calls_of_the_same_shapes_are_captured_once_and_replayed(tmp_path: Path) -> None:
    with hand_runner(tmp_path) as runner:
        (stream,) = stand_in.HostStream.made
        for call, captures in enumerate((0, 1, 1, 1), 1):
            check_run(runner, EMBEDS * call)
            assert stream.captures == captures
        (context,) = stand_in.Runtime.opened.contexts
        assert len(context.runs) == 2  # one run, one recorded; the others are replays
        assert context.runs[0] == context.runs[1]
        for call, captures in enumerate((1, 2, 2), 1):
            check_run(runner, EMBEDS[:, :2] * call)
            assert stream.captures == captures
        check_run(runner, EMBEDS)
        assert stream.captures == 2


@pytest.mark.usefixtures("can_run")
def test_results_of_a_call_are_not_changed_by_the_next(tmp_path: Path) -> None:
    with hand_runner(tmp_path) as runner:
        feeds = {"past_key_values.0.key": PAST}
        first = runner.run(feeds | {"inputs_embeds": EMBEDS})["logits"]
        kept = first.copy()
        runner.run(feeds | {"inputs_embeds": EMBEDS * 2})
        np.testing.assert_array_equal(first, kept)


@pytest.mark.usefixtures("can_run")
def test_an_engine_that_cannot_be_captured_runs_all_the_same(tmp_path: Path) -> None:
    with hand_runner(tmp_path, capturable=False) as runner:
        for call in range(1, 5):
            check_run(runner, EMBEDS * call)
    assert [stream.captures for stream in stand_in.HostStream.made] == [0]


@pytest.mark.usefixtures("can_run")
def test_a_call_after_one_that_was_refused_is_right(tmp_path: Path) -> None:
    with hand_runner(tmp_path) as runner:
        check_run(runner, EMBEDS)
        with pytest.raises(InputError):
            runner.run({"past_key_values.0.key": PAST, "inputs_embeds": np.zeros((2, 5, WIDTH), np.float32)})
        for call in range(1, 4):
            check_run(runner, EMBEDS * call)


@pytest.mark.usefixtures("can_run")
def test_an_engine_of_fixed_shapes_needs_no_profile(tmp_path: Path) -> None:
    model = decoder_graph()
    for value in [*model.graph.input, *model.graph.output]:
        for axis, size in ((0, 2), (1, 3 if value.name in ("inputs_embeds", "logits") else 1)):
            value.type.tensor_type.shape.dim[axis].dim_value = size
    for value in (model.graph.input[1], model.graph.output[1]):
        value.type.tensor_type.shape.dim[2].dim_value = 2 if value.name.startswith("past") else 5
    with TensorRTRunner(write_engine(tmp_path, model, ()), backend=BACKEND, device="cpu") as runner:
        check_run(runner, EMBEDS)


@pytest.mark.usefixtures("can_run")
def test_rtx_captures_by_itself_and_a_decoder_s_kernels_do_not_depend_on_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    kernels = SimpleNamespace(EAGER="eager", NONE="none")
    monkeypatch.setattr(stand_in, "CudaGraphStrategy", graphs, raising=False)
    monkeypatch.setattr(stand_in, "DynamicShapesKernelSpecializationStrategy", kernels, raising=False)
    with hand_runner(tmp_path) as runner:
        for call in range(1, 4):
            check_run(runner, EMBEDS * call)
    (context,) = stand_in.Runtime.opened.contexts
    assert context.config.cuda_graph_strategy == "whole"
    assert context.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert len(context.runs) == 3
    assert stand_in.HostStream.made[0].captures == 0
    with hand_decoder(tmp_path) as decoder:
        decoder.step({"inputs_embeds": EMBEDS})
    (context,) = stand_in.Runtime.opened.contexts
    assert not hasattr(context.config, "cuda_graph_strategy")
    assert context.config.dynamic_shapes_kernel_specialization_strategy == "none"


def swap_dtype(path: Path) -> None:
    first, *rest = EngineRecord.read(sidecar_of(path)).inputs
    rewrite(path, inputs=(Binding(first.name, "float16", first.dims), *rest))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.usefixtures("can_run")
@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (Path.unlink, InputError, "tiny.engine: the engine cannot be read"),
        (lambda path: path.write_bytes(b"short"), InputError, "has 5 bytes; its sidecar says"),
        (
            lambda path: rewrite(path, backend="tensorrt"),
            InputError,
            "was built with tensorrt 1.0.stand-in; here is",
        ),
        (
            lambda path: rewrite(path, backend_version="0.9"),
            InputError,
            "stand-in 0.9; here is stand-in 1.0.stand-in",
        ),
        (damage, EngineError, "(it serves 8.9; here: no GPU): deserialize: magic tag does not match"),
        (swap_dtype, InputError, "disagree on INPUT inputs_embeds float16; INPUT inputs_embeds float32"),
        (lambda path: rewrite(path, profiles=HAND * 2), InputError, "has 1 profiles; its sidecar says 2"),
    ],
)
def test_an_engine_that_is_not_what_its_sidecar_says_is_refused(
    harm: Callable[[Path], Any],
    kind: type[SarsteerError],
    words: str,
    tmp_path: Path,
) -> None:
    path = write_engine(tmp_path, decoder_graph(), HAND)
    harm(path)
    with pytest.raises(kind) as error, decoder_of(path):
        pass
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("can_run")
@pytest.mark.parametrize("fault", ["host", "shape"])
def test_tensors_of_shapes_are_refused(fault: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"'inputs_embeds' of .* is a tensor of shapes"),
        hand_decoder(tmp_path, **{fault: "inputs_embeds"}),
    ):
        pass


@pytest.mark.usefixtures("can_run")
def test_a_device_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: str) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nmore")

    monkeypatch.setattr(opened, "_open_stream", absent)
    path = write_engine(tmp_path, decoder_graph(), HAND)
    with (
        pytest.raises(
            UnsupportedError, match=r"device 'cuda:9' cannot be used: CUDA error: invalid device ordinal$"
        ),
        TensorRTDecoder(path, backend=BACKEND, device="cuda:9"),
    ):
        pass


def test_the_interface_is_known_before_anything_can_run(tmp_path: Path) -> None:
    decoder = hand_decoder(tmp_path)
    assert [str(spec) for spec in decoder.inputs] == [
        "inputs_embeds: float32 [batch, sequence, 4]",
        "past_key_values.0.key: float32 [batch, 1, past, 4]",
    ]
    assert [spec.name for spec in decoder.outputs] == ["logits", "present.0.key"]


def test_a_sidecar_that_is_missing_or_names_a_strange_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sidecar cannot be read"):
        decoder_of(tmp_path / "absent.engine")
    path = write_engine(tmp_path, decoder_graph(), HAND)
    rewrite(path, inputs=(Binding("inputs_embeds", "complex64", ("batch", 4)),))
    with pytest.raises(InputError, match="'inputs_embeds' is complex64; expected one of float32"):
        decoder_of(path)


@pytest.mark.skipif(cuda_driver().problem is None, reason="this machine has a GPU")
@pytest.mark.parametrize("kind", [TensorRTRunner, TensorRTDecoder])
def test_without_a_gpu_the_real_library_is_not_even_asked(kind: type, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    rtx = BACKENDS["tensorrt-rtx"]
    path = write_engine(tmp_path, decoder_graph(), HAND, backend=rtx)
    with (
        pytest.raises(UnsupportedError, match=r"^tensorrt-rtx runs on an NVIDIA GPU") as error,
        kind(path, backend=rtx),
    ):
        pass
    assert error.value.exit_code == 3
    assert str(cuda_driver().problem) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch reaches a GPU")
def test_a_torch_that_cannot_reach_the_gpu_is_named_with_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match="install a build of torch") as error:
        check_torch_cuda(BACKEND)
    assert torch.__version__ in str(error.value)


def test_the_stand_in_has_nothing_that_the_real_library_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for mine, real in (
        (stand_in.Runtime, trt.Runtime),
        (stand_in.Engine, trt.ICudaEngine),
        (stand_in.Context, trt.IExecutionContext),
        (stand_in.TensorLocation, trt.TensorLocation),
        (stand_in.TensorIOMode, trt.TensorIOMode),
        (stand_in.DataType, trt.DataType),
        (stand_in.ExecutionContextAllocationStrategy, trt.ExecutionContextAllocationStrategy),
    ):
        names = {name for name in vars(mine) if not name.startswith("_")} - {"opened"}
        assert names
        assert names <= set(dir(real)), mine
    assert {"num_io_tensors", "num_optimization_profiles"} <= set(dir(trt.ICudaEngine))
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(trt.IRuntimeConfig, name)
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE != trt.CudaGraphStrategy.DISABLED
    kernels = trt.DynamicShapesKernelSpecializationStrategy
    assert len({kernels.EAGER, kernels.NONE, kernels.LAZY}) == 3


def test_the_real_library_reads_a_mapped_file_and_says_why_it_is_none_of_its_engines(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = log_of(BACKENDS["tensorrt-rtx"])
    log.start()
    path = tmp_path / "none.engine"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert trt.Runtime(log).deserialize_cuda_engine(content) is None
    assert any("serialization" in line.lower() for line in log.errors), log.errors


@pytest.mark.parametrize("name", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 0, 4)])
def test_arrays_come_back_from_the_device_to_the_bit(name: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(name)
    content = np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize)
    if name == "bool":
        content = bytes(byte & 1 for byte in content)
    array = np.frombuffer(content, dtype).reshape(shape)  # read-only, and with NaN among the values
    assert not array.flags.writeable
    tensor = allocate(shape, dtype, "cpu")
    assert tensor.dtype == TORCH_DTYPES[name]
    fill(tensor, array)
    back = to_host(tensor)
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


def test_bfloat16_has_the_values_that_torch_gives_it() -> None:
    array = np.array([1.0, -2.5, 3.140625, 1e30], dtype=ml_dtypes.bfloat16)
    tensor = allocate(array.shape, array.dtype, "cpu")
    fill(tensor, array)
    assert tensor.tolist() == array.astype(np.float64).tolist()
    signalling_nan = np.array([0x7F81], np.uint16).view(ml_dtypes.bfloat16)
    tensor = allocate((1,), signalling_nan.dtype, "cpu")
    fill(tensor, signalling_nan)
    assert to_host(tensor).tobytes() == signalling_nan.tobytes()


def test_arrays_that_are_not_contiguous_are_copied_in_their_own_order() -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    tensor = allocate((2, 3), array.dtype, "cpu")
    fill(tensor, array)
    np.testing.assert_array_equal(to_host(tensor), array)


def test_tensors_without_elements_have_different_addresses() -> None:
    tensors = [allocate((2, 0, 4), np.dtype(np.float32), "cpu") for _ in range(3)]
    assert len({address(tensor) for tensor in tensors} - {0}) == 3
    full = allocate((2, 3), np.dtype(np.float32), "cpu")
    assert address(full) == full.data_ptr()


@pytest.mark.usefixtures("can_run")
@pytest.mark.parametrize(("here", "error"), [("9.0", UnsupportedError), ("8.9", EngineError)])
def test_a_gpu_that_the_engine_does_not_serve_is_no_failure_of_the_engine(
    here: str, error: type[SarsteerError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu("Test GPU", here, 1)
    monkeypatch.setattr(opened, "cuda_driver", lambda: CudaDriver("13.0", (gpu,), None))
    path = write_engine(tmp_path, decoder_graph(), HAND)
    path.write_bytes(b"X" * path.stat().st_size)
    with (
        pytest.raises(SarsteerError, match=rf"it serves 8\.9; here: Test GPU {here}") as caught,
        decoder_of(path),
    ):
        pass
    assert type(caught.value) is error
