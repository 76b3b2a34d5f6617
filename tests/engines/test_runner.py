"""Runners check what they are fed, carry the cache from step to step, and hold nothing when closed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.errors import EngineError, InputError
from engines.onnxruntime_runner import OnnxRuntimeDecoder, OnnxRuntimeRunner
from engines.runner import TensorSpec, check_feeds
from tests.engines.graphs import WIDTH, decoder_graph

EMBEDS = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
PAST = np.random.default_rng(1).standard_normal((2, 1, 2, WIDTH)).astype(np.float32)
MATRIX = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH) / 10


def expected(embeds_BSD: np.ndarray, cache_BTD: np.ndarray) -> np.ndarray:
    return (embeds_BSD + cache_BTD.mean(axis=1, keepdims=True)) @ MATRIX


@pytest.fixture
def decoder() -> Iterator[OnnxRuntimeDecoder]:
    with OnnxRuntimeDecoder(decoder_graph().SerializeToString()) as runner:
        yield runner


def test_a_runner_knows_the_graph_s_interface() -> None:
    with OnnxRuntimeRunner(decoder_graph().SerializeToString()) as runner:
        assert [str(spec) for spec in runner.inputs] == [
            "inputs_embeds: float32 [batch, sequence, 4]",
            "past_key_values.0.key: float32 [batch, 1, past, 4]",
        ]
        assert [spec.name for spec in runner.outputs] == ["logits", "present.0.key"]


def test_a_runner_runs_the_graph() -> None:
    with OnnxRuntimeRunner(decoder_graph().SerializeToString()) as runner:
        outputs = runner.run({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST})
    cache = np.concatenate([PAST[:, 0], EMBEDS], axis=1)
    np.testing.assert_array_equal(outputs["present.0.key"][:, 0], cache)
    np.testing.assert_allclose(outputs["logits"], expected(EMBEDS, cache), rtol=1e-5, atol=1e-6)


def test_external_data_is_found_beside_a_file_and_in_the_folder_of_a_graph_in_memory(tmp_path: Path) -> None:
    graph = decoder_graph(weights=tmp_path / "weights.bin")
    onnx.save(graph, tmp_path / "decoder.onnx")
    for source in (
        OnnxRuntimeRunner(tmp_path / "decoder.onnx"),
        OnnxRuntimeRunner(graph.SerializeToString(), data_folder=tmp_path),
    ):
        with source as runner:
            outputs = runner.run({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST})
        cache = np.concatenate([PAST[:, 0], EMBEDS], axis=1)
        np.testing.assert_allclose(outputs["logits"], expected(EMBEDS, cache), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, ["'inputs_embeds' is missing", "past_key_values.0.key"]),
        ({"past_key_values.0.key": None}, ["'past_key_values.0.key' is missing"]),
        ({"input_ids": EMBEDS}, ["'input_ids' is unknown", "inputs_embeds"]),
        ({"inputs_embeds": EMBEDS.astype(np.float64)}, ["is float64", "expected float32"]),
        ({"inputs_embeds": EMBEDS[0]}, ["shape (3, 4)", "[batch, sequence, 4]"]),
        ({"inputs_embeds": EMBEDS[..., :3]}, ["shape (2, 3, 3)", "expected 4"]),
        ({"past_key_values.0.key": PAST[:1]}, ["shape (1, 1, 2, 4)", "expected 2 for batch"]),
    ],
)
def test_wrong_inputs_are_refused_before_anything_runs(
    feeds: dict[str, np.ndarray | None], words: list[str]
) -> None:
    given: dict[str, np.ndarray] = {"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST} if feeds else {}
    for name, array in feeds.items():
        if array is None:
            del given[name]
        else:
            given[name] = array
    with OnnxRuntimeRunner(decoder_graph().SerializeToString()) as runner, pytest.raises(InputError) as error:
        runner.run(given)
    for word in words:
        assert word in str(error.value)


def test_one_symbol_is_one_size_across_inputs() -> None:
    specs = (
        TensorSpec("a", np.dtype(np.int64), ("batch", "total")),
        TensorSpec("b", np.dtype(np.int64), ("batch", "total")),
    )
    a, b = np.zeros((2, 5), np.int64), np.zeros((2, 4), np.int64)
    check_feeds(specs, {"a": a, "b": a})
    with pytest.raises(InputError, match=r"'b' has shape \(2, 4\); expected 5 for total"):
        check_feeds(specs, {"a": a, "b": b})


def test_a_decoder_carries_its_cache_until_it_is_reset(decoder: OnnxRuntimeDecoder) -> None:
    first = decoder.step({"inputs_embeds": EMBEDS})
    assert list(first) == ["logits"]
    np.testing.assert_allclose(first["logits"], expected(EMBEDS, EMBEDS), rtol=1e-5, atol=1e-6)
    for step in range(1, 4):
        token = EMBEDS[:, :1] * step
        before = decoder.cache()["present.0.key"]
        logits = decoder.step({"inputs_embeds": token})["logits"]
        after = decoder.cache()["present.0.key"]
        np.testing.assert_array_equal(after, np.concatenate([before, token[:, None]], axis=2))
        np.testing.assert_allclose(logits, expected(token, after[:, 0]), rtol=1e-5, atol=1e-6)
    decoder.reset()
    np.testing.assert_array_equal(decoder.step({"inputs_embeds": EMBEDS})["logits"], first["logits"])
    assert decoder.cache()["present.0.key"].shape == (2, 1, 3, WIDTH)


def test_a_cache_that_was_taken_does_not_change_with_later_steps(decoder: OnnxRuntimeDecoder) -> None:
    decoder.step({"inputs_embeds": EMBEDS})
    taken = decoder.cache()["present.0.key"]
    copy = taken.copy()
    decoder.step({"inputs_embeds": EMBEDS * 2})
    np.testing.assert_array_equal(taken, copy)


def test_a_decoder_is_not_fed_its_cache(decoder: OnnxRuntimeDecoder) -> None:
    with pytest.raises(InputError, match=r"'past_key_values\.0\.key' is unknown"):
        decoder.step({"inputs_embeds": EMBEDS, "past_key_values.0.key": PAST})


def test_a_decoder_takes_arrays_that_are_not_contiguous(decoder: OnnxRuntimeDecoder) -> None:
    turned = np.asfortranarray(EMBEDS)
    assert not turned.flags.c_contiguous
    np.testing.assert_allclose(
        decoder.step({"inputs_embeds": turned})["logits"], expected(EMBEDS, EMBEDS), rtol=1e-5, atol=1e-6
    )


def test_a_cache_input_without_its_output_is_refused() -> None:
    graph = decoder_graph()
    del graph.graph.output[1]
    with (
        pytest.raises(InputError, match=r"no output 'present\.0\.key'"),
        OnnxRuntimeDecoder(graph.SerializeToString()),
    ):
        pass


@pytest.mark.parametrize("kind", [OnnxRuntimeRunner, OnnxRuntimeDecoder])
def test_a_closed_runner_refuses_to_run(kind: type[OnnxRuntimeRunner]) -> None:
    runner = kind(decoder_graph().SerializeToString())
    with pytest.raises(RuntimeError, match="closed"):
        _call(runner)
    with runner:
        assert runner.session is not None
    with pytest.raises(RuntimeError, match="closed"):
        _call(runner)


def _call(runner: OnnxRuntimeRunner) -> None:
    feeds = {"inputs_embeds": EMBEDS}
    if isinstance(runner, OnnxRuntimeDecoder):
        runner.step(feeds)
    else:
        runner.run(feeds | {"past_key_values.0.key": PAST})


def test_a_runner_can_be_opened_again(decoder: OnnxRuntimeDecoder) -> None:
    runner = OnnxRuntimeDecoder(decoder_graph().SerializeToString())
    seen = []
    for _ in range(2):
        with runner:
            seen.append(runner.step({"inputs_embeds": EMBEDS})["logits"])
            assert runner.cache()["present.0.key"].shape[2] == 3
    np.testing.assert_array_equal(*seen)


@pytest.mark.parametrize("damage", ["truncated", "missing", "random", "unknown operator"])
def test_a_graph_that_the_runtime_refuses_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    graph = decoder_graph()
    source: bytes | Path = graph.SerializeToString()[:-40]
    if damage == "missing":
        source = tmp_path / "absent.onnx"
    elif damage == "random":
        source = np.random.default_rng(0).bytes(500)
    elif damage == "unknown operator":
        graph.graph.node[0].op_type = "Levitate"
        source = graph.SerializeToString()
    with pytest.raises(EngineError, match="refuses the graph") as error, OnnxRuntimeRunner(source):
        pass
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 5


def test_a_run_that_fails_inside_the_runtime_is_an_engine_error() -> None:
    graph = decoder_graph()
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "width"  # the graph lies about its width
    with (
        OnnxRuntimeDecoder(graph.SerializeToString()) as runner,
        pytest.raises(EngineError, match="failed to run"),
    ):
        runner.step({"inputs_embeds": EMBEDS[..., :3]})
