"""The fewest passes give what the plain loop gives, hear every clip once, and fall back where they must."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import continuation, prompt_passes
from calibration.calibrate import REFUSAL_PROMPT, CalibrationSettings, calibrate
from calibration.collection import Collecting, Collection
from calibration.continuation import Past, fork
from calibration.directions import SteeringSettings
from calibration.kept_prompts import KeptStore
from calibration.lalm import Lalm, encode_requests, load_lalm
from calibration.magnitudes import LargestMagnitudes, recorded_magnitudes
from calibration.prompt_passes import PromptPasses
from calibration.requests import load_audio, read_requests
from calibration.statistics import StateStatistics
from calibration.unfinished import UnfinishedFile
from tests.calibration.test_calibrate import literal_state

POCKET = Path(__file__).parents[2] / "examples" / "pocket_lalm"
ATOL = 2e-6
"""Batching, padding and cached prefixes reorder float32 sums: measured at most 1e-6 on states of size 4."""
Pair = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def encoded(lalm: Lalm, path: Path, *, count: int = 6) -> Pair:
    """Prompts of unequal length, without and with a suffix of its own for each."""
    requests = read_requests(path)[:count]
    clips = [load_audio(request.audio, sampling_rate=lalm.sampling_rate) for request in requests]
    texts = [f"{request.text}{' again' * row}" for row, request in enumerate(requests)]
    return (
        encode_requests(lalm, texts, clips),
        encode_requests(lalm, [text + REFUSAL_PROMPT for text in texts], clips),
    )


def whole_states(lalm: Lalm, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Last-position block outputs (B, L, D) by one whole pass and the model's own hidden states."""
    last: list[torch.Tensor] = []
    handle = lalm.parts.final_norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.inference_mode():
        hidden = lalm.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return np.stack([layer[:, -1].numpy() for layer in (*hidden[1:-1], last[0])], axis=1)


@contextmanager
def encoder_rows(lalm: Lalm) -> Iterator[list[int]]:
    """Within the block, the list grows by the clips of each computation inside the audio encoder."""
    rows: list[int] = []
    parts = lalm.adapter.audio_parts
    assert parts is not None
    first: Any = parts.encoder.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


@contextmanager
def passes_of(lalm: Lalm) -> Iterator[PromptPasses]:
    with measured_passes_of(lalm) as (passes, _):
        yield passes


@contextmanager
def measured_passes_of(lalm: Lalm) -> Iterator[tuple[PromptPasses, LargestMagnitudes]]:
    with recorded_magnitudes(lalm.parts) as record:
        passes = PromptPasses(lalm, record)
        with passes.prepared():
            yield passes, record


def whole_magnitudes(lalm: Lalm, *prompts: dict[str, torch.Tensor]) -> np.ndarray:
    """The largest |h| (L,) in whole passes."""
    with recorded_magnitudes(lalm.parts) as record, torch.inference_mode():
        for inputs in prompts:
            lalm.model(**inputs, use_cache=False)
    return record.largest_L()


def larger(past: Past | None, factor: float = 30.0) -> Past | None:
    """A cache whose values are not those that were computed."""
    if past is None:
        return None
    cache = fork(past.cache)
    for layer in cache.layers:
        layer.values = layer.values * factor
    return Past(cache, past.mask_BP)


HEAD_PAST = prompt_passes._Head.past


def test_pairs_and_single_prompts_have_the_states_of_whole_passes(lalm: Lalm, harmful_requests: Path) -> None:
    inputs, longer = encoded(lalm, harmful_requests)
    with encoder_rows(lalm) as rows, passes_of(lalm) as passes:
        prompt, refused_BLD = passes.pair(inputs, longer)
        single = passes.single(inputs)
        assert passes.obstacle is None
    assert rows == [6, 6]  # once for the pair, comparison included, and once for the single prompts
    for got_BLD, wanted in ((prompt.states_BLD, inputs), (refused_BLD, longer), (single.states_BLD, inputs)):
        np.testing.assert_allclose(got_BLD, whole_states(lalm, wanted), rtol=0, atol=ATOL)
    assert float((refused_BLD - prompt.states_BLD).abs().max()) > 1000 * ATOL


def test_what_all_prompts_begin_with_is_run_once(lalm: Lalm, harmful_requests: Path) -> None:
    inputs, longer = encoded(lalm, harmful_requests)
    seen: list[tuple[int, int]] = []
    with passes_of(lalm) as passes:
        passes.pair(inputs, longer)
        handle = lalm.parts.blocks[0].register_forward_pre_hook(
            lambda _, args: seen.append(tuple(args[0].shape[:2]))
        )
        passes.pair(inputs, longer)
        passes.single(inputs)
        handle.remove()
    columns = inputs["input_ids"].shape[1]
    head = int((inputs["input_ids"][0] == lalm.adapter.audio_token_id).nonzero()[0])
    head -= int((inputs["attention_mask"][0] == 0).sum())
    assert head >= 3
    added = longer["input_ids"].shape[1] - columns
    (prompt, continued, single) = seen
    assert prompt == single == (6, columns - head)
    assert (
        0 < continued[1] - added < 20
    )  # what is behind the text: the end of the turn and the next one's beginning


BROKEN = {
    "the hole is attended to": ("up_to", lambda past, _: continuation.Past(fork(past.cache), past.mask_BP)),
    "the cache ends a token early": (
        "up_to",
        lambda past, lengths, right=continuation.up_to: right(past, [n - 1 for n in lengths]),
    ),
    "a model's own code fails": ("rest_of", lambda *_: {"no": "such input"}),
    "the cache's values are larger": (
        "up_to",
        lambda past, n, right=continuation.up_to: larger(right(past, n)),
    ),
    "the cache's values are NaN": (
        "up_to",
        lambda past, n, right=continuation.up_to: larger(right(past, n), float("nan")),
    ),
}


@pytest.mark.parametrize(("name", "wrong"), BROKEN.values(), ids=BROKEN)
def test_a_continuation_that_is_wrong_is_seen_and_not_used(
    lalm: Lalm,
    harmful_requests: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    wrong: Any,
) -> None:
    monkeypatch.setattr(prompt_passes, name, wrong)
    inputs, longer = encoded(lalm, harmful_requests)
    with caplog.at_level(logging.WARNING, logger="calibration"), measured_passes_of(lalm) as (passes, record):
        prompt, refused_BLD = passes.pair(inputs, longer)
        passes.pair(inputs, longer)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("every prompt is run in full: ")
    np.testing.assert_allclose(prompt.states_BLD, whole_states(lalm, inputs), rtol=0, atol=ATOL)
    np.testing.assert_allclose(refused_BLD, whole_states(lalm, longer), rtol=0, atol=ATOL)
    np.testing.assert_allclose(record.largest_L(), whole_magnitudes(lalm, inputs, longer), rtol=0, atol=ATOL)


BROKEN_HEAD = {
    "larger": lambda self, *args: larger(HEAD_PAST(self, *args)),
    "nan": lambda self, *args: larger(HEAD_PAST(self, *args), float("nan")),
    "fails": lambda self, *_: self.no_such_thing,
}


@pytest.mark.parametrize("wrong", BROKEN_HEAD.values(), ids=BROKEN_HEAD)
def test_single_prompts_that_come_first_are_compared_too(
    lalm: Lalm,
    harmful_requests: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: Any,
) -> None:
    monkeypatch.setattr(prompt_passes._Head, "past", wrong)
    inputs, _ = encoded(lalm, harmful_requests)
    with caplog.at_level(logging.WARNING, logger="calibration"), measured_passes_of(lalm) as (passes, record):
        prompt = passes.single(inputs)
        passes.single(inputs)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("every prompt is run in full: ")
    np.testing.assert_allclose(prompt.states_BLD, whole_states(lalm, inputs), rtol=0, atol=ATOL)
    np.testing.assert_allclose(record.largest_L(), whole_magnitudes(lalm, inputs), rtol=0, atol=ATOL)


def test_pairs_behind_single_prompts_are_still_compared(
    lalm: Lalm,
    harmful_requests: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_passes, "up_to", lambda past, _: larger(past))
    inputs, longer = encoded(lalm, harmful_requests)
    with passes_of(lalm) as passes:
        passes.single(inputs)
        assert passes.obstacle is None
        _, refused_BLD = passes.pair(inputs, longer)
        assert passes.obstacle is not None
    np.testing.assert_allclose(refused_BLD, whole_states(lalm, longer), rtol=0, atol=ATOL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_run_without_pairs_notices_a_wrong_continuation(
    lalm: Lalm,
    harmful_requests: Path,
    benign_requests: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    workers: int,
) -> None:
    monkeypatch.setattr("calibration.collection.worker_count", lambda _: workers)
    requests = (read_requests(harmful_requests), read_requests(benign_requests))

    def collected(how: Collecting) -> tuple[StateStatistics, list[float]]:
        with KeptStore.opened(0) as store:
            collection = Collection(lalm, requests, REFUSAL_PROMPT, store, how)
            collection.begin()
            return collection.collect()

    def stop(stage: str, _done: int, _count: int) -> None:
        if stage == "benign":
            raise KeyboardInterrupt

    wanted, wanted_largest = collected(Collecting(batch_size=2))
    file = UnfinishedFile(tmp_path / ".plan", {})
    with pytest.raises(KeyboardInterrupt, match="8 of 11 requests"):
        collected(Collecting(batch_size=2, unfinished=file, progress=stop))
    monkeypatch.setattr(prompt_passes._Head, "past", BROKEN_HEAD["larger"])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="calibration"):
        found, largest = collected(Collecting(batch_size=2, unfinished=file))
    going_on, in_full = caplog.messages
    assert "8 of 11 requests are done" in going_on
    assert in_full.startswith("every prompt is run in full: run on from a cache")
    np.testing.assert_allclose(found.benign_mean_LD, wanted.benign_mean_LD, rtol=0, atol=ATOL)
    np.testing.assert_allclose(largest, wanted_largest, rtol=1e-5, atol=0)  # kept to six digits


def text_first(lalm: Lalm) -> Lalm:
    """The same model with a template that puts the text before the clip."""
    processor = copy.deepcopy(lalm.processor)
    processor.chat_template = (
        "{% for message in messages %}<|im_start|>{% for part in message['content'] | reverse %}"
        "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
    )
    return dataclasses.replace(lalm, processor=processor)


def test_text_before_the_audio_is_run_in_full_and_every_clip_still_heard_once(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = text_first(lalm)
    inputs, longer = encoded(other, harmful_requests)
    with encoder_rows(other) as rows, caplog.at_level(logging.WARNING), passes_of(other) as passes:
        prompt, refused_BLD = passes.pair(inputs, longer)
    assert caplog.messages == ["every prompt is run in full: text comes before the audio in its prompts"]
    assert rows == [6]
    np.testing.assert_allclose(prompt.states_BLD, whole_states(other, inputs), rtol=0, atol=ATOL)
    np.testing.assert_allclose(refused_BLD, whole_states(other, longer), rtol=0, atol=ATOL)
    with encoder_rows(other) as rows:
        calibrate(other, harmful_requests, benign_requests, CalibrationSettings(SteeringSettings(rank=3)))
    assert sum(rows) == 11


def test_a_whole_calibration_hears_every_clip_once(
    lalm: Lalm, harmful_requests: Path, benign_requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrationSettings(SteeringSettings(rank=3), batch_size=4)
    with encoder_rows(lalm) as rows:
        plan = calibrate(lalm, harmful_requests, benign_requests, settings)
    assert sum(rows) == 11
    for room in (0, 200_000):  # no room for any cache, for some: encoder outputs in a file, and in memory
        with encoder_rows(lalm) as rows:
            other = calibrate_in(lalm, harmful_requests, benign_requests, room)
        assert sum(rows) == 11
        np.testing.assert_allclose(other, plan.provenance["largest_magnitude"]["steered"], rtol=1e-5, atol=0)


def calibrate_in(lalm: Lalm, harmful: Path, benign: Path, room: int) -> list[float]:
    """The steered magnitudes, with that many bytes to keep what was run."""
    from calibration.directions import steering_plan

    with KeptStore.opened(room) as store:
        requests = (read_requests(harmful), read_requests(benign))
        collection = Collection(lalm, requests, REFUSAL_PROMPT, store, Collecting(batch_size=4))
        statistics, _ = collection.collect()
        return collection.steered_magnitudes(steering_plan(statistics, SteeringSettings(rank=3)))


def test_the_pocket_lalm_is_calibrated_as_by_the_plain_loop() -> None:
    """One request at a time, whole passes, float64 NumPy; few clips, so that it takes seconds."""
    lalm = load_lalm(POCKET / "model")
    files = [POCKET / "data" / f"train_{kind}.jsonl" for kind in ("harmful", "benign")]
    plan = calibrate(lalm, *files, CalibrationSettings(SteeringSettings(rank=4), limit=6))
    harmful, benign = (read_requests(file, limit=6) for file in files)
    plain = np.stack([literal_state(lalm, request, "") for request in harmful])
    refused = np.stack([literal_state(lalm, request, REFUSAL_PROMPT) for request in harmful])
    safe = np.stack([literal_state(lalm, request, "") for request in benign])
    for layer, edit in enumerate(plan.edits):
        v = (refused - plain)[:, layer].mean(axis=0)
        U = np.linalg.svd((safe[:, layer] - safe[:, layer].mean(axis=0)).T)[0][:, :4]
        expected = v - U @ (U.T @ v)
        got = edit.tensors()["vector"].astype(np.float64)
        assert got @ expected / np.linalg.norm(got) / np.linalg.norm(expected) >= 0.99999
        assert abs(np.linalg.norm(got) / np.linalg.norm(expected) - 1) <= 1e-3


# --------------------------------------------------------------------------------------------------- the parts
