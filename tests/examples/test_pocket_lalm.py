"""What is shipped of the pocket LALM is what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint import fingerprint
from calibration.lalm import load_lalm
from calibration.plan import SteeringPlan
from calibration.requests import read_requests
from sarsteer_export.behaviour import eager_answers
from tests.sarsteer_export.command_line import answered_json, sarsteer

POCKET = Path(__file__).parents[2] / "examples" / "pocket_lalm"
SPLITS = ("train", "validation", "test")
KINDS = ("harmful", "benign")
FOUR = ("train_harmful", "train_benign", "validation_harmful", "validation_benign")
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


def test_the_shipped_sweep_is_of_this_checkpoint_and_chose_what_is_built() -> None:
    found = json.loads((POCKET / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    chosen = found["chosen"]
    plan = SteeringPlan.load(POCKET / "sweep" / "plan.safetensors")
    assert plan.digest() == chosen["plan"]
    assert found["inputs"]["model_fingerprint"] == fingerprint(POCKET / "model")
    built = (POCKET / "build.toml").read_text(encoding="utf-8").splitlines()
    assert [f"{name} = {chosen[name]}" in built for name in ("alpha", "lambda", "rank")] == [True] * 3
    card = (POCKET / "README.md").read_text(encoding="utf-8")
    page = (POCKET / "sweep" / "sweep.md").read_text(encoding="utf-8")
    runs, alphas = (line for line in page.split("\n\n") if line.startswith(("| line |", "| alpha |")))
    assert runs in card
    assert alphas in card


def test_a_small_sweep_finds_the_shipped_setting(tmp_path: Path) -> None:
    data = {name: POCKET / "data" / f"{name}.jsonl" for name in FOUR}
    config, grid = (
        POCKET / "sweep.toml",
        ("--alphas", "0.3,0.39,0.56", "--ranks", "2,5", "--eval-limit", "10"),
    )
    sets = ("--harmful", data[FOUR[0]], "--benign", data[FOUR[1]])
    held_out = ("--eval-harmful", data[FOUR[2]], "--eval-benign", data[FOUR[3]])
    call = ("sweep", POCKET / "model", "--config", config, *sets, *held_out, *grid)
    chosen = answered_json(sarsteer(*call, "-o", tmp_path / "sweep", "--json"))["chosen"]
    assert (chosen["rank"], chosen["lambda"], chosen["alpha"]) == (5, 1.0, 0.39)
    assert chosen["figures"]["attack_success"]["value"] == 0.0
    assert chosen["figures"]["benign_answered"]["value"] == 1.0
