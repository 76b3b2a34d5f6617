"""Every family is calibrated as by whole passes over one request at a time, and every clip is heard once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.calibrate import REFUSAL_PROMPT
from calibration.collection import Collecting, Collection
from calibration.directions import SteeringSettings, steering_plan
from calibration.kept_prompts import KeptStore
from calibration.lalm import Lalm, encode_requests
from calibration.magnitudes import recorded_magnitudes
from calibration.requests import SpokenRequest, read_requests
from calibration.states import load_clips
from calibration.steered import steered
from tests.zoo.families import Family

RUN_IN_FULL = {
    "Gemma 4": "has a value per token",
}
"""Families whose prompts are not run on from a cache, and what the log says of it."""


def requests_for(lalm: Lalm, path: Path) -> list[SpokenRequest]:
    """Three requests whose prompts end differently: a first block with a short window sees nothing else."""
    return [
        SpokenRequest(
            request.audio if lalm.hears else None, request.text + " please" * (number + 1) + ".!?"[number]
        )
        for number, request in enumerate(read_requests(path)[2:5])
    ]


def plain_states(lalm: Lalm, request: SpokenRequest, suffix: str) -> np.ndarray:
    """Last-position block outputs (L, D) of one request alone, in one whole pass, without hooks of ours."""
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0, -1].double())

    handles = [block.register_forward_hook(keep) for block in lalm.parts.blocks]
    with torch.inference_mode():
        clips = load_clips(lalm, [request]) if lalm.hears else None
        lalm.model(**encode_requests(lalm, [request.text + suffix], clips), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(outputs).numpy()


def test_statistics_are_those_of_the_plain_loop(
    family: Family,
    family_lalm: Lalm,
    harmful_requests: Path,
    benign_requests: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lalm = family_lalm
    harmful, benign = (requests_for(lalm, path) for path in (harmful_requests, benign_requests))
    with KeptStore.opened() as store, caplog.at_level(logging.WARNING, logger="calibration"):
        collection = Collection(lalm, (harmful, benign), REFUSAL_PROMPT, store, Collecting(batch_size=2))
        statistics, unsteered = collection.collect()
        plan = steering_plan(statistics, SteeringSettings(rank=1, alpha=5.0))
        largest = collection.steered_magnitudes(plan)
    if family.name in RUN_IN_FULL:
        assert len(caplog.messages) == 1
        assert RUN_IN_FULL[family.name] in caplog.messages[0]
    else:
        assert caplog.messages == []

    plain, safe = (
        np.stack([plain_states(lalm, request, "") for request in kind]) for kind in (harmful, benign)
    )
    refused = np.stack([plain_states(lalm, request, REFUSAL_PROMPT) for request in harmful])
    for layer in range(statistics.layers):
        centred = safe[:, layer] - safe[:, layer].mean(axis=0)
        root = statistics.benign_root_LKD[layer]
        for got, wanted in (
            (statistics.refusal_sum_LD[layer], (refused - plain)[:, layer].sum(axis=0)),
            (statistics.benign_mean_LD[layer], safe[:, layer].mean(axis=0)),
            ((root.T @ root).ravel(), (centred.T @ centred).ravel()),
        ):
            assert got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted) >= 0.99999
            assert abs(np.linalg.norm(got) / np.linalg.norm(wanted) - 1) <= 1e-3

    with recorded_magnitudes(lalm.parts) as record:
        for request in (*harmful, *benign):
            plain_states(lalm, request, "")
        for request in harmful:
            plain_states(lalm, request, REFUSAL_PROMPT)
    np.testing.assert_allclose(unsteered, record.largest_L(), rtol=2e-5, atol=0)
    with steered(lalm.parts, plan), recorded_magnitudes(lalm.parts) as record:
        for request in (*harmful, *benign):
            plain_states(lalm, request, "")
    np.testing.assert_allclose(largest, record.largest_L(), rtol=2e-5, atol=0)
