"""Several batches at once: results in order, weights shared, the same plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import prompt_passes, workers
from calibration.calibrate import CalibrationSettings, calibrate
from calibration.continuation import Past
from calibration.directions import SteeringSettings
from calibration.lalm import Lalm
from calibration.workers import (
    BATCH_SIZE,
    FirstAlone,
    default_batch_size,
    in_order,
    one_thread_each,
    sharing_weights,
    worker_count,
)


def test_results_come_in_order_from_all_workers_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    used: list[tuple[str, int]] = []

    def work(worker: str, thing: int) -> int:
        used.append((worker, thing))
        both.wait()  # two at the same time, or never
        return thing * thing

    assert list(in_order(["a", "b"], range(6), work)) == [(n, n * n) for n in range(6)]
    assert {worker for worker, _ in used} == {"a", "b"}
    assert list(in_order(["a"], [], work)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_done_before_the_first_but_all_is_prepared(fails: bool) -> None:
    things = [object() for _ in range(4)]
    second_prepared, second_done = threading.Event(), threading.Event()

    def prepare(_worker: str, thing: object) -> int:
        number = things.index(thing)
        if number == 1:
            second_prepared.set()
        return number

    def do(_worker: str, number: int) -> int:
        if number == 0:
            assert second_prepared.wait(timeout=30)  # at the same time, or never
            assert not second_done.wait(timeout=0.1)
            if fails:
                raise ZeroDivisionError
        if number == 1:
            second_done.set()
        return number

    running = in_order(["a", "b"], things, FirstAlone(prepare, do, things[0]))
    if fails:
        with pytest.raises(ZeroDivisionError):
            list(running)
    else:
        assert list(running) == list(zip(things, range(4), strict=True))


def test_an_error_in_a_worker_is_raised() -> None:
    def work(worker: str, thing: int) -> int:
        return 1 // (3 - thing)

    with pytest.raises(ZeroDivisionError):
        list(in_order(["a", "b"], range(6), work))


def test_a_copy_shares_weights_and_not_hooks(lalm: Lalm) -> None:
    other = sharing_weights(lalm)
    pairs = zip(lalm.model.parameters(), other.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    before = list(other.parts.blocks[0]._forward_hooks)  # transformers leaves some of its own
    handle = lalm.parts.blocks[0].register_forward_hook(lambda *_: None)
    assert list(other.parts.blocks[0]._forward_hooks) == before
    handle.remove()


def test_only_small_models_on_the_cpu_run_several_batches_at_once(
    lalm: Lalm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert worker_count(lalm) == 3
    assert [default_batch_size(lalm, requests) for requests in (1, 60, 1000)] == [8, 10, 32]
    monkeypatch.setattr(workers, "SMALL_PARAMETERS", 1000)
    assert worker_count(lalm) == 1
    assert [default_batch_size(lalm, requests) for requests in (1, 1000)] == [BATCH_SIZE, BATCH_SIZE]


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    with one_thread_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_plan_is_the_same_to_the_bit(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for count in (1, 3):
        monkeypatch.setattr("calibration.collection.worker_count", lambda _, count=count: count)
        with one_thread_each():
            settings = CalibrationSettings(SteeringSettings(rank=2), batch_size=2)
            plans.append(calibrate(lalm, harmful_requests, benign_requests, settings))
    one, several = plans
    for got, wanted in zip(several.edits, one.edits, strict=True):
        np.testing.assert_array_equal(got.tensors()["vector"], wanted.tensors()["vector"])
    assert several.provenance == one.provenance


@pytest.mark.parametrize("shift", range(3))
def test_every_worker_is_steered_and_measured(
    shift: int, lalm: Lalm, harmful_requests: Path, benign_requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrationSettings(SteeringSettings(rank=2, alpha=1000.0), batch_size=2)
    largest = []
    for count in (1, 3):
        monkeypatch.setattr("calibration.collection.worker_count", lambda _, count=count: count)
        if count > 1:

            def in_turn(workers: Sequence[Any], things: Sequence[Any], work: Any) -> Iterator[Any]:
                for number, thing in enumerate(things):
                    yield thing, work(workers[(number + shift) % len(workers)], thing)

            monkeypatch.setattr("calibration.collection.in_order", in_turn)
        with one_thread_each(), torch.inference_mode():
            plan = calibrate(lalm, harmful_requests, benign_requests, settings)
        largest.append(plan.provenance["largest_magnitude"]["steered"])
    np.testing.assert_allclose(largest[1], largest[0], rtol=1e-5, atol=0)  # kept to six digits


def test_nothing_is_run_on_from_a_cache_before_the_verdict(
    lalm: Lalm,
    harmful_requests: Path,
    benign_requests: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = CalibrationSettings(SteeringSettings(rank=2), batch_size=2)
    wanted = calibrate(lalm, harmful_requests, benign_requests, settings)
    monkeypatch.setattr("calibration.collection.worker_count", lambda _: 3)
    right, calls = prompt_passes.up_to, []

    def wrong(past: Past, lengths: Sequence[int]) -> Past:
        calls.append(lengths)
        cut = right(past, lengths)
        for layer in cut.cache.layers:
            layer.values = layer.values * 30
        return cut

    monkeypatch.setattr(prompt_passes, "up_to", wrong)
    found = calibrate(lalm, harmful_requests, benign_requests, settings)
    assert caplog.messages[0].startswith("every prompt is run in full: run on from a cache")
    assert len(calls) == 1
    for runs, largest in wanted.provenance["largest_magnitude"].items():
        # kept to six digits
        np.testing.assert_allclose(found.provenance["largest_magnitude"][runs], largest, rtol=1e-5, atol=0)
    for got, edit in zip(found.edits, wanted.edits, strict=True):
        # whole passes and continued ones: float32 sums in another order, see test_prompt_passes
        np.testing.assert_allclose(got.tensors()["vector"], edit.tensors()["vector"], rtol=0, atol=2e-6)
