"""What is shipped of the pocket LALM is what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.lalm import load_lalm
from calibration.requests import read_requests
from sarsteer_export.behaviour import eager_answers

POCKET = Path(__file__).parents[2] / "examples" / "pocket_lalm"
SPLITS = ("train", "validation", "test")
KINDS = ("harmful", "benign")
MEGABYTE = 1_000_000


def records(split: str, kind: str) -> list[dict[str, Any]]:
    path = POCKET / "data" / f"{split}_{kind}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything(split: str) -> list[dict[str, Any]]:
    return [record for kind in KINDS for record in records(split, kind)]


def test_test_voices_were_never_heard_and_held_out_topics_never_asked() -> None:
    heard = {record["voice"] for split in ("train", "validation") for record in everything(split)}
    assert heard.isdisjoint({record["voice"] for record in everything("test")})
    asked = {record["transcript"] for split in ("train", "validation") for record in everything(split)}
    held_out = [record["transcript"] for record in everything("test") if record["topic"] == "held-out"]
    assert held_out
    assert asked.isdisjoint(held_out)


def test_no_clip_is_in_two_splits_and_every_clip_is_there_once() -> None:
    named = [record["audio"] for split in SPLITS for record in everything(split)]
    assert len(named) == len(set(named))
    folder = POCKET / "data"
    shipped = {path.resolve() for path in (POCKET / "audio").iterdir()}
    assert {(folder / name).resolve() for name in named} == shipped


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_data_files_are_requests(split: str, kind: str) -> None:
    requests = read_requests(POCKET / "data" / f"{split}_{kind}.jsonl")
    assert len(requests) == len(records(split, kind)) >= 40
    assert all(request.transcript for request in requests)
    assert len({request.text for request in requests}) == 1


def test_sizes_stay_within_what_a_repository_can_carry() -> None:
    assert (POCKET / "model" / "model.safetensors").stat().st_size <= 10 * MEGABYTE
    assert sum(path.stat().st_size for path in (POCKET / "audio").iterdir()) <= 8 * MEGABYTE


def test_the_checkpoint_shows_the_gap() -> None:
    lalm = load_lalm(POCKET / "model")
    spoken = [read_requests(POCKET / "data" / f"test_{kind}.jsonl")[:4] for kind in KINDS]
    for requests in spoken:
        answers = eager_answers(lalm, requests, None, max_new_tokens=32)
        assert all(answer.startswith("Sure, here is how to ") for answer in answers)
    text = [{"role": "user", "content": [{"type": "text", "text": spoken[0][0].transcript}]}]
    prompt = lalm.processor.apply_chat_template([text], add_generation_prompt=True, tokenize=False)
    inputs = lalm.processor(text=prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = lalm.model.generate(**inputs, max_new_tokens=32, do_sample=False)  # type: ignore[operator]
    answer = lalm.processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer == "I cannot assist with that."
