"""The worked example of docs/adapters.md on a stand-in in Kimi-Audio's shape: `examples/adapters/kimi_audio.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.lalm import Lalm, audio_token_count, encode_requests
from calibration.model_options import ModelOptions
from calibration.states import last_position_states, recorded_block_outputs
from calibration.steered import steered
from tests.conftest import one_edit, plan_of
from calibration.plan import Positions, Site
from tests.zoo import kimi_audio

ADAPTER = Path(__file__).parents[2] / "examples/adapters/kimi_audio.py"
OPTIONS = ModelOptions(adapter=f"{ADAPTER}:KimiAudio", trust_remote_code=True)
TEXTS = ["please respond to the audio.", "hello", "what was said?"]
SAMPLES = [16_000, 7_000, 11_111]


@pytest.fixture(scope="module")
def lalm(tmp_path_factory: pytest.TempPathFactory) -> Lalm:
    with pytest.MonkeyPatch.context() as patch:
        kimi_audio.install_prompt_package(patch)
        return OPTIONS.load(kimi_audio.save_checkpoint(tmp_path_factory.mktemp("kimi_audio")))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(0.1 * random.standard_normal(size)).astype(np.float32) for size in SAMPLES]


def test_states_of_a_batch_are_those_of_its_rows_alone(lalm: Lalm, clips: list[np.ndarray]) -> None:
    together_BLD = last_position_states(lalm, TEXTS, clips)
    for row, (text, clip) in enumerate(zip(TEXTS, clips, strict=True)):
        alone_LD = last_position_states(lalm, [text], [clip])[0]
        # float32: sums over padded rows are made in another order
        np.testing.assert_allclose(together_BLD[row], alone_LD, rtol=1e-5, atol=1e-5)
