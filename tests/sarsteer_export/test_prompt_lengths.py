"""Prompts against profiles: what a build will ask of its engines is known before they are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.errors import InputError
from calibration.lalm import Lalm
from calibration.requests import SpokenRequest, read_requests
from engines.profiles import ProfileLimits, derive_profiles
from engines.sidecar import Binding
from sarsteer_export.prompt_lengths import Asked, check_prompts, prompt_length
from tests import tiny_lalm
from tests.sarsteer_export.command_line import listing, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs

DECODER = (
    Binding("inputs_embeds", "float32", ("batch", "sequence", tiny_lalm.WIDTH)),
    Binding("attention_mask", "int64", ("batch", "total")),
    Binding("position_ids", "int64", ("batch", "sequence")),
    Binding("past_key_values.0.key", "float32", ("batch", 2, "past", 16)),
)


@pytest.fixture(scope="module")
def requests(harmful_requests: Path) -> tuple[SpokenRequest, ...]:
    return read_requests(harmful_requests)


@pytest.fixture(scope="module")
def lengths(lalm: Lalm, requests: tuple[SpokenRequest, ...]) -> list[int]:
    found = [prompt_length(lalm, request) for request in requests]
    assert len(set(found)) > 1
    return found


@pytest.mark.parametrize(
    ("shorter_prompt", "shorter_total", "rows", "word"),
    [
        (0, 0, 2, None),
        (1, 0, 2, "'inputs_embeds'"),
        (0, 1, 2, "'attention_mask'"),
        (0, 0, 1, "axis 0"),
    ],
)
def test_the_longest_is_named_when_prompt_answer_or_rows_do_not_fit(
    lalm: Lalm,
    requests: tuple[SpokenRequest, ...],
    lengths: list[int],
    shorter_prompt: int,
    shorter_total: int,
    rows: int,
    word: str | None,
) -> None:
    steps, longest = 5, max(lengths)
    limits = ProfileLimits(
        max_batch=rows, max_prompt=longest - shorter_prompt, max_total=longest + steps - shorter_total
    )
    asked = [Asked(requests, 2, steps)]
    if word is None:
        check_prompts(lalm, asked, DECODER, derive_profiles(DECODER, limits))
        return
    with pytest.raises(InputError) as caught:
        check_prompts(lalm, asked, DECODER, derive_profiles(DECODER, limits))
    message = str(caught.value)
    assert message.startswith(f"request {requests[lengths.index(longest)].audio}: ")
    assert f"{longest} positions, and {steps} more" in message
    assert word in message
    assert "--max-total" in message


@pytest.mark.parametrize(
    "options", [("--max-prompt", "8"), ("--max-total", "60", "--max-prompt", "60")], ids=["prompt", "answer"]
)
def test_a_build_refuses_prompts_that_its_engines_do_not_admit_before_it_works(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("it went on to calibrate")

    monkeypatch.setattr("sarsteer_export.pipeline.make_plan", work)
    build = (*inputs.quick_build, "--engine", "tensorrt-rtx", *options, "-o", tmp_path / "b")
    refused(sarsteer(*build), "flac: its prompt is the longest", "requests at once", "--max-prompt")
    assert listing(tmp_path) == {}
