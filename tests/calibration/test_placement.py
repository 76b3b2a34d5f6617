"""Models spread over devices by accelerate, parts of them on disk, give the same plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import placement
from calibration.calibrate import CalibrationRun, CalibrationSettings, calibrate
from calibration.directions import SteeringSettings
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests, load_lalm
from calibration.placement import input_device
from tests.tiny_lalm import SPLIT

SETTINGS = CalibrationSettings(SteeringSettings(rank=2), limit=3)


@pytest.mark.parametrize("device_map", ["auto", SPLIT], ids=["auto", "split, parts on disk"])
def test_a_spread_model_gives_the_same_plan(
    checkpoint: Path,
    lalm: Lalm,
    harmful_requests: Path,
    benign_requests: Path,
    device_map: str | dict[str, str],
) -> None:
    run = CalibrationRun(device_map=device_map)
    found = calibrate(checkpoint, harmful_requests, benign_requests, SETTINGS, run=run)
    wanted = calibrate(lalm, harmful_requests, benign_requests, SETTINGS)
    for got, edit in zip(found.edits, wanted.edits, strict=True):
        np.testing.assert_array_equal(got.tensors()["vector"], edit.tensors()["vector"])


def test_inputs_go_where_the_embedding_is_computed(checkpoint: Path) -> None:
    spread = load_lalm(checkpoint, device_map=SPLIT)
    assert spread.model.get_input_embeddings().weight.device.type == "meta"
    assert input_device(spread.model) == torch.device("cpu")


def test_a_model_without_weights_is_refused(lalm: Lalm) -> None:
    with torch.device("meta"):
        empty = type(lalm.model)(lalm.model.config)
    with pytest.raises(InputError, match="lies on the meta device, without weights"):
        encode_requests(dataclasses.replace(lalm, model=empty), ["please respond."], None)


def test_a_device_map_needs_accelerate_and_a_known_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="device map is 'everywhere'; expected one of auto, balanced"):
        load_lalm(checkpoint, device_map="everywhere")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"accelerate.*pip install 'sarsteer-export\[accelerate\]'"):
        load_lalm(checkpoint, device_map="auto")
