"""The worked example of docs/adapters.md on a stand-in in Kimi-Audio's shape: `examples/adapters/kimi_audio.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.lalm import Lalm, audio_token_count, encode_requests
from calibration.model_options import ModelOptions, driven_by
from calibration.plan import Add, Positions, SteeringPlan
from calibration.remote_code import code_digest
from calibration.states import last_position_states
from calibration.steered import steered
from calibration.token_positions import position_ids
from tests.conftest import random_vector
from tests.zoo import kimi_audio

ADAPTER = Path(__file__).parents[2] / "examples/adapters/kimi_audio.py"
OPTIONS = ModelOptions(adapter=f"{ADAPTER}:KimiAudio", trust_remote_code=True)
TEXTS = ["please respond to the audio.", "hello", "what was said?"]
SAMPLES = [16_000, 7_000, 11_111]
ATOL = 1e-5
"""Padding and batching reorder sums in float32; states are of the order of 1."""


@pytest.fixture(scope="module")
def lalm(tmp_path_factory: pytest.TempPathFactory) -> Lalm:
    with pytest.MonkeyPatch.context() as patch:
        kimi_audio.install_prompt_package(patch)
        return OPTIONS.load(kimi_audio.save_checkpoint(tmp_path_factory.mktemp("kimi_audio")))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(0.1 * random.standard_normal(size)).astype(np.float32) for size in SAMPLES]


@pytest.fixture(scope="module")
def plan(lalm: Lalm) -> SteeringPlan:
    width, depth = lalm.parts.hidden_size, len(lalm.parts.blocks)
    edits = [Add(layer, random_vector(width, seed=layer), positions=Positions.LAST) for layer in range(depth)]
    return SteeringPlan(width, depth, edits)


def test_its_blocks_that_write_are_steered_and_those_that_speak_are_left_out(lalm: Lalm) -> None:
    model = lalm.model.model
    assert lalm.parts.blocks == tuple(model.layers)
    assert lalm.parts.final_norm is model.norm
    assert lalm.parts.lm_head is lalm.model.lm_head
    assert len(model.mimo_layers) == 0


def test_both_streams_and_the_clips_features_are_merged_in_front(lalm: Lalm, clips: list[np.ndarray]) -> None:
    inputs = encode_requests(lalm, TEXTS, clips)
    rows = inputs["attention_mask"].sum(dim=1)
    for row, length in enumerate(rows.tolist()):
        prompt = lalm.adapter._prompt(TEXTS[row], clips[row])
        audio_ids, text_ids, spoken = prompt.to_tensor()
        assert (length, int(spoken.sum())) == (audio_ids.shape[1], audio_token_count(lalm, clips[row]))
        with torch.no_grad():
            expected = lalm.model.model.merged(audio_ids, text_ids, prompt.continuous_feature, spoken)
        torch.testing.assert_close(inputs["inputs_embeds"][row, -length:], expected[0], rtol=0, atol=0)
        assert not inputs["inputs_embeds"][row, :-length].any()


def test_a_token_that_was_written_stands_beside_silence(lalm: Lalm) -> None:
    ids = torch.arange(20, 40)[None]
    blank = torch.full_like(ids, lalm.adapter.pad_token_id)
    with torch.no_grad():
        expected = lalm.model.model.merged(blank, ids, None, None)
        torch.testing.assert_close(lalm.adapter.embed_tokens(ids), expected, rtol=0, atol=0)


def test_states_of_a_batch_are_those_of_its_rows_alone(lalm: Lalm, clips: list[np.ndarray]) -> None:
    together_BLD = last_position_states(lalm, TEXTS, clips)
    alone_BLD = np.stack(
        [last_position_states(lalm, [text], [clip])[0] for text, clip in zip(TEXTS, clips, strict=True)]
    )
    np.testing.assert_allclose(together_BLD, alone_BLD, rtol=0, atol=ATOL)
    deaf_BLD = last_position_states(lalm, TEXTS, clips[::-1])
    assert np.abs(deaf_BLD - together_BLD).max() > 100 * ATOL


def test_it_is_steered_in_prefill_and_in_cached_steps(
    lalm: Lalm, clips: list[np.ndarray], plan: SteeringPlan
) -> None:
    inputs = encode_requests(lalm, TEXTS, clips)
    with torch.inference_mode(), steered(lalm.parts, plan):
        written = lalm.adapter.generate(inputs, max_new_tokens=4)
    assert written.shape == (len(TEXTS), 4)
    with torch.inference_mode():
        assert not torch.equal(written, lalm.adapter.generate(inputs, max_new_tokens=4))
        embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
        for step in range(
            4
        ):  # the same without a cache: a step adds where earlier ones added, each at its last token
            with _last_of_every_step(lalm, plan, first=inputs["attention_mask"].shape[1] - 1):
                hidden = lalm.parts.decoder(
                    inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids(mask)
                ).last_hidden_state
            tokens = lalm.adapter.logits(hidden)[:, -1].argmax(dim=-1)
            assert tokens.tolist() == written[:, step].tolist()
            embeds = torch.cat([embeds, lalm.adapter.embed_tokens(tokens[:, None])], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)


class _last_of_every_step:  # noqa: N801 - a context, read as one
    """Adds a plan's vectors by hooks at column `first` and all behind it: what every step so far added."""

    def __init__(self, lalm: Lalm, plan: SteeringPlan, *, first: int) -> None:
        self.lalm, self.plan, self.first = lalm, plan, first

    def __enter__(self) -> None:
        def hook(edit: Add):
            def add(_block, _args, output):
                moved = output.clone()
                moved[:, self.first :] += edit.strength * torch.from_numpy(edit.vector.copy())
                return moved

            return add

        blocks = self.lalm.parts.blocks
        self.handles = [blocks[edit.layer].register_forward_hook(hook(edit)) for edit in self.plan.edits]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def test_what_drives_it_is_recorded(lalm: Lalm) -> None:
    assert driven_by(lalm) == {
        "adapter": "KimiAudio",
        "adapter_sha256": hashlib.sha256(ADAPTER.read_bytes()).hexdigest(),
        "remote_code_sha256": code_digest(lalm.path),
    }
