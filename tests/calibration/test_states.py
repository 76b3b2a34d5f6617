"""Hidden states at the last attended position: which position that is, and whose output is recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.errors import UnsupportedError
from calibration.lalm import Lalm, encode_requests
from calibration.requests import load_audio, read_requests
from calibration.states import (
    hidden_of,
    last_attended,
    last_position_states,
    recorded_block_outputs,
)
from tests import tiny_lalm

BATCHING_ATOL = 2e-6
"""Left padding and batching reorder float32 sums: measured at most 3e-7 on states of magnitude 0.7."""


@pytest.mark.parametrize(
    ("mask", "sequence", "expected"),
    [
        ([[1, 1, 1]], 3, [[0, 0, 1]]),
        ([[0, 1, 1], [0, 0, 1]], 3, [[0, 0, 1], [0, 0, 1]]),
        ([[1, 1, 0], [1, 0, 0]], 3, [[0, 1, 0], [1, 0, 0]]),
        ([[1, 0, 1, 0]], 4, [[0, 0, 1, 0]]),
        ([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], 1, [[1], [1]]),
        ([[1, 1, 1, 0, 0, 1, 1, 0]], 4, [[0, 0, 1, 0]]),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], 2, [[0, 0], [1, 0]]),
        ([[0, 0, 0]], 3, [[0, 0, 0]]),
    ],
    ids=["full", "left", "right", "hole", "decode", "chunk", "nothing in this pass", "nothing"],
)
def test_the_last_attended_position_of_this_pass_is_marked(
    mask: list[list[int]], sequence: int, expected: list[list[int]]
) -> None:
    for dtype in (torch.long, torch.bool, torch.float32):
        marked = last_attended(torch.tensor(mask).to(dtype), sequence)
        assert marked.dtype == torch.bool
        np.testing.assert_array_equal(marked, np.array(expected, dtype=bool))


def test_hidden_states_are_the_tensor_or_the_first_of_a_tuple() -> None:
    hidden = torch.zeros(1, 1, 1)
    assert hidden_of(hidden) is hidden
    assert hidden_of((hidden, None)) is hidden
    with pytest.raises(TypeError, match="returned dict"):
        hidden_of({"hidden": hidden})


def test_recorded_outputs_are_the_models_own_hidden_states(lalm: Lalm) -> None:
    inputs = encode_requests(lalm, ["please respond.", "respond."], None)
    with torch.inference_mode(), recorded_block_outputs(lalm.parts) as outputs:
        result = lalm.model(**inputs, output_hidden_states=True, use_cache=False)
        # hidden_states: the embedding, every block's output, and the last one after the final norm
        for layer in range(tiny_lalm.LAYERS - 1):
            np.testing.assert_array_equal(outputs[layer], result.hidden_states[layer + 1])
        np.testing.assert_array_equal(lalm.parts.final_norm(outputs[-1]), result.hidden_states[-1])


def test_recording_leaves_no_hooks_behind_even_after_an_exception(lalm: Lalm) -> None:
    before = [dict(block._forward_hooks) for block in lalm.parts.blocks]
    with pytest.raises(KeyError), recorded_block_outputs(lalm.parts):
        raise KeyError
    assert [dict(block._forward_hooks) for block in lalm.parts.blocks] == before


def requests_of(path: Path) -> tuple[list[str], list[np.ndarray]]:
    requests = read_requests(path)
    audios = [load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE) for request in requests]
    return [f"{request.text} {'again ' * row}" for row, request in enumerate(requests)], audios


def test_states_are_block_outputs_at_the_last_prompt_position(lalm: Lalm, harmful_requests: Path) -> None:
    texts, audios = requests_of(harmful_requests)
    states = last_position_states(lalm, texts[:1], audios[:1])
    with torch.inference_mode():
        inputs = encode_requests(lalm, texts[:1], audios[:1])
        hidden = lalm.model(**inputs, output_hidden_states=True).hidden_states
    assert states.dtype == np.float32
    assert states.shape == (1, tiny_lalm.LAYERS, tiny_lalm.WIDTH)
    for layer in range(tiny_lalm.LAYERS - 1):
        np.testing.assert_allclose(states[0, layer], hidden[layer + 1][0, -1], rtol=0, atol=BATCHING_ATOL)


def test_a_batch_gives_what_each_request_gives_alone(lalm: Lalm, harmful_requests: Path) -> None:
    texts, audios = requests_of(harmful_requests)
    batched = last_position_states(lalm, texts, audios)
    alone = np.concatenate(
        [last_position_states(lalm, [text], [clip]) for text, clip in zip(texts, audios, strict=True)]
    )
    np.testing.assert_allclose(batched, alone, rtol=0, atol=BATCHING_ATOL)
    assert np.abs(alone[0] - alone[1]).max() > 100 * BATCHING_ATOL


def test_states_of_several_streams_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"shape \(4, 1, 3, 8\); expected one residual stream"):
        hidden_of(torch.zeros(4, 1, 3, 8))
