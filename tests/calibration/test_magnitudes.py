"""The largest magnitudes of the residual stream: where they are taken, over which positions, steered or not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests
from calibration.magnitudes import LargestMagnitudes, Measured, recorded_magnitudes, steered_magnitudes
from calibration.plan import Add, Positions, Site, SteeringPlan
from calibration.requests import load_audio, read_requests
from calibration.steered import steered
from tests import tiny_lalm
from tests.conftest import plan_of, random_vector

RTOL = 1e-5
"""Batching reorders float32 sums (a few 1e-7 here), and magnitudes keep six digits (5e-6)."""


def peak(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def literal_magnitudes(lalm: Lalm, path: Path, plan: SteeringPlan | None = None) -> np.ndarray:
    """One request at a time, so without padding, from the model's own hidden states and its norms' inputs."""
    found = np.zeros(tiny_lalm.LAYERS)
    for request in read_requests(path):
        clip = load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE)
        inputs = encode_requests(lalm, [request.text], [clip])
        assert inputs["attention_mask"].all()
        read: list[torch.Tensor] = []
        with torch.inference_mode(), nullcontext() if plan is None else steered(lalm.model, plan):
            norms = [(block.input_layernorm, block.post_attention_layernorm) for block in lalm.parts.blocks]
            handles = [
                norm.register_forward_pre_hook(lambda _, args, into=read: into.append(args[0].clone()))
                for norm in (*(norm for pair in norms for norm in pair), lalm.parts.final_norm)
            ]
            hidden = lalm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            for handle in handles:
                handle.remove()
        for layer in range(tiny_lalm.LAYERS):
            if plan is None:  # hidden_states: what each block reads, and the normed stream at the end
                np.testing.assert_array_equal(read[2 * layer], hidden[layer])
            found[layer] = max(found[layer], *(peak(tensor) for tensor in read[2 * layer : 2 * layer + 3]))
    return found


def unsteered_magnitudes(lalm: Lalm, path: Path) -> np.ndarray:
    """All requests in one batch, the shorter ones padded."""
    requests = read_requests(path)
    clips = [load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE) for request in requests]
    inputs = encode_requests(lalm, [request.text for request in requests], clips)
    assert not inputs["attention_mask"].all()
    with torch.inference_mode(), recorded_magnitudes(lalm.parts) as record:
        lalm.model(**inputs, use_cache=False)
    return record.largest_L()


@contextmanager
def padding_replaced(lalm: Lalm, value: float) -> Iterator[None]:
    """The embeddings at padding are `value`; attended positions do not see them."""

    def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        padding = ~kwargs["attention_mask"].bool()[..., None]
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].masked_fill(padding, value)}

    handle = lalm.parts.decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def spiked(lalm: Lalm, position: int, value: float) -> Iterator[None]:
    """The stream between attention and MLP of block 1 reaches `value` at one position, and nowhere else."""
    _, block, _ = lalm.parts.blocks

    def add(_module: Any, _args: Any, output: Any) -> Any:
        output[0][:, position, 0] += value
        return output

    def remove(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output[:, position, 0] -= value

    handles = [block.self_attn.register_forward_hook(add), block.mlp.register_forward_hook(remove)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_magnitudes_are_the_largest_of_what_norms_read_and_blocks_return(
    lalm: Lalm, harmful_requests: Path
) -> None:
    found = unsteered_magnitudes(lalm, harmful_requests)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, literal_magnitudes(lalm, harmful_requests), rtol=RTOL, atol=0)
    assert len(set(found)) > 1


def test_padding_does_not_count(lalm: Lalm, harmful_requests: Path) -> None:
    expected = unsteered_magnitudes(lalm, harmful_requests)
    with padding_replaced(lalm, 1e4):
        found = unsteered_magnitudes(lalm, harmful_requests)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=0)
    assert expected.max() < 10


@pytest.mark.parametrize("position", [-1, -7], ids=["the last position", "an early position"])
def test_the_stream_between_attention_and_mlp_counts_at_every_position(
    lalm: Lalm, harmful_requests: Path, position: int
) -> None:
    before = unsteered_magnitudes(lalm, harmful_requests)
    with spiked(lalm, position, 100):
        found = unsteered_magnitudes(lalm, harmful_requests)
    assert 90 < found[1] < 110
    assert max(found[0], found[2], *before) < 10


STEERING = {
    "block outputs, last": (
        Add(0, random_vector(64, seed=1, scale=3)),
        Add(1, random_vector(64, seed=2, scale=3)),
    ),
    "block output, all": (Add(1, random_vector(64, seed=3, scale=5), positions=Positions.ALL),),
    "block input": (Add(0, random_vector(64, seed=4, scale=4), site=Site.BLOCK_INPUT),),
    "the last block's output": (Add(2, random_vector(64, seed=5, scale=6)),),
}


@pytest.mark.parametrize("edits", STEERING.values(), ids=STEERING)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_steered_magnitudes_are_those_behind_the_edits(
    lalm: Lalm, harmful_requests: Path, edits: tuple[Add, ...], batch_size: int
) -> None:
    plan = plan_of(*edits)
    found = steered_magnitudes(lalm, read_requests(harmful_requests), plan, batch_size=batch_size)
    expected = literal_magnitudes(lalm, harmful_requests, plan)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=0)
    unsteered = unsteered_magnitudes(lalm, harmful_requests)
    first = edits[0].layer
    np.testing.assert_allclose(found[:first], unsteered[:first], rtol=RTOL, atol=0)
    assert np.all(np.array(found[first:]) > 3 * unsteered[first:])


def test_steered_magnitudes_report_progress_and_are_plain_numbers(lalm: Lalm, harmful_requests: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = steered_magnitudes(
        lalm,
        read_requests(harmful_requests),
        plan_of(Add(0, random_vector(64, seed=1))),
        batch_size=4,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("steered", 4, 6), ("steered", 6, 6)]
    assert [type(value) for value in found] == [float] * tiny_lalm.LAYERS
    assert all(value == float(f"{value:.6g}") for value in found)


def test_the_largest_over_several_passes_is_kept_and_past_columns_of_a_mask_are_not_of_this_pass() -> None:
    record = LargestMagnitudes(2)
    decoder = torch.nn.Identity()
    hidden_BSD = torch.tensor([[[9.0, 1.0], [-3.0, 2.0]], [[1.0, -4.0], [float("nan"), 99.0]]])
    record.read_mask(decoder, (), {"attention_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])})
    record.see(0, hidden_BSD)
    record.see(1, hidden_BSD.half() / 4)
    np.testing.assert_array_equal(record.largest_L(), [4, 1])
    record.see(0, hidden_BSD[:, 1:] * torch.tensor([2.0, 0.0])[:, None, None])  # a decode step
    np.testing.assert_array_equal(record.largest_L(), [6, 1])
    record.read_mask(decoder, (), {})
    record.see(1, hidden_BSD[:1])
    np.testing.assert_array_equal(record.largest_L(), [6, 9])
    assert record.per_block(steered=False) == [6.0, 9.0]


@pytest.mark.parametrize(
    ("measured", "before_last"),
    [(Measured.PROMPT, 2), (Measured.HEAD, 7), (Measured.REFUSED, 0), (Measured.NOTHING, 0)],
)
def test_what_comes_before_the_last_token_of_prompts_is_kept_apart(
    measured: Measured, before_last: float
) -> None:
    record = LargestMagnitudes(2)
    with record.taking(measured):
        record.see(1, torch.tensor([[[1.0, -2.0], [7.0, 0.0]]]))
    np.testing.assert_array_equal(record.before_last_L(), [0, before_last])
    np.testing.assert_array_equal(record.largest_L(), [0, 0 if measured is Measured.NOTHING else 7])


def test_a_pass_ends_where_another_kind_or_another_shape_begins() -> None:
    record = LargestMagnitudes(1)
    record.see(0, torch.tensor([[[3.0], [1.0]]]))
    record.see(0, torch.tensor([[[2.0], [4.0], [9.0]]]))
    with record.taking(Measured.REFUSED):
        pass
    np.testing.assert_array_equal(record.before_last_L(), [4])
    np.testing.assert_array_equal(record.largest_L(), [9])


def test_what_a_failed_pass_reached_is_forgotten() -> None:
    record = LargestMagnitudes(1)
    record.see(0, torch.full((1, 1, 2), 3.0))

    def fail() -> None:
        with record.forgotten_on_error():
            record.see(0, torch.full((1, 1, 2), 9.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    np.testing.assert_array_equal(record.largest_L(), [3])


def test_a_mask_of_another_rank_is_refused() -> None:
    mask = {"attention_mask": torch.ones(1, 1, 2, 2)}
    with pytest.raises(UnsupportedError, match=r"2-D attention mask .* got torch.Size\(\[1, 1, 2, 2\]\)"):
        LargestMagnitudes(1).read_mask(torch.nn.Identity(), (), mask)


def half(lalm: Lalm, *, block: int, scale: float) -> Lalm:
    """The model in float16, what the MLP of one block adds scaled up."""
    model = copy.deepcopy(lalm.model)
    with torch.no_grad():
        model.get_decoder().layers[block].mlp.up_proj.weight.mul_(scale)
        model.get_decoder().layers[block].mlp.down_proj.weight.mul_(scale)
    return dataclasses.replace(lalm, model=model.half())


def test_an_unsteered_stream_that_overflows_is_refused_with_its_block(
    lalm: Lalm, harmful_requests: Path
) -> None:
    large = half(lalm, block=1, scale=1e4)
    requests = read_requests(harmful_requests)
    clips = [load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE) for request in requests]
    with torch.inference_mode(), recorded_magnitudes(large.parts) as record:
        large.model(**encode_requests(large, [request.text for request in requests], clips), use_cache=False)
    with pytest.raises(
        InputError, match=r"the unsteered residual stream .* in block 1; it overflows float16, calibrate in"
    ):
        record.per_block(steered=False)


def test_a_steered_stream_that_overflows_is_refused_with_its_block(
    lalm: Lalm, harmful_requests: Path
) -> None:
    requests = read_requests(harmful_requests)
    far = np.full(64, 4e4, dtype=np.float32)
    fits, overflows = plan_of(Add(0, far)), plan_of(Add(0, far), Add(2, far))
    narrow = half(lalm, block=1, scale=1)
    assert 3.9e4 < max(steered_magnitudes(narrow, requests, fits, batch_size=8)) < 4.1e4
    with pytest.raises(
        InputError, match=r"the steered residual stream .* in block 2; it overflows float16.* or lower alpha"
    ):
        steered_magnitudes(narrow, requests, overflows, batch_size=8)


def test_no_hooks_are_left_behind_even_after_an_exception(lalm: Lalm) -> None:
    def hooks() -> list[int]:
        modules = lalm.parts.decoder.modules()
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]

    before = hooks()
    with recorded_magnitudes(lalm.parts):
        assert hooks() != before
    assert hooks() == before
    with pytest.raises(KeyError), recorded_magnitudes(lalm.parts):
        raise KeyError
    assert hooks() == before
