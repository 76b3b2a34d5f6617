"""Requests in every form a user has them, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from calibration.plan import SteeringPlan
from sarsteer_export.bundle.manifest import BEHAVIOUR_REPORT
from tests import tiny_lalm
from tests.sarsteer_export.command_line import answered, answered_json, listing, one_error, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs

datasets.disable_progress_bars()
TEXT = "please respond to the audio."
RANK = ("--rank", "1")


def clips_of(requests: Path) -> list[Path]:
    return [requests.parent / json.loads(line)["audio"] for line in requests.read_text().splitlines()]


def rewritten(form: str, requests: Path, folder: Path) -> str | Path:
    """The same clips and text in another form."""
    clips = clips_of(requests)
    records = [{"audio": str(clip), "text": TEXT} for clip in clips]
    if form == "JSON":
        (folder / "r.json").write_text(json.dumps(records, indent=1))
        return folder / "r.json"
    if form == "CSV":
        (folder / "r.csv").write_text("\n".join(["audio,text", *(f"{clip},{TEXT}" for clip in clips)]))
        return folder / "r.csv"
    if form == "folder":
        for clip in clips:
            shutil.copy(clip, folder / clip.name)
        return folder
    if form == "reference list":
        (folder / "question").mkdir()
        for clip in clips:
            shutil.copy(clip, folder / "question" / clip.name)
        listed = [{"scenario": "x", "audio_file": clip.name, "question": None} for clip in clips]
        (folder / "train_6.json").write_text(json.dumps(listed))
        return folder / "train_6.json"
    rows = datasets.Dataset.from_list(records).cast_column("audio", datasets.Audio())
    if form == "data set":
        datasets.DatasetDict({"train": rows}).save_to_disk(folder / "saved")
        return f"{folder / 'saved'}#train"
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_the_plan_does_not_depend_on_the_form_of_the_data(inputs: Inputs, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.safetensors"
    answered(sarsteer("calibrate", inputs.model, *inputs.data, *RANK, "-o", wanted))
    for form in ("JSON", "CSV", "folder", "reference list", "data set", "parquet"):
        for kind in ("harmful", "benign"):
            (tmp_path / form / kind).mkdir(parents=True)
        harmful = rewritten(form, inputs.harmful, tmp_path / form / "harmful")
        benign = rewritten(form, inputs.benign, tmp_path / form / "benign")
        output = tmp_path / f"{form}.safetensors"
        data = ("--harmful", harmful, "--benign", benign, "--prompt", TEXT)
        answered(sarsteer("calibrate", inputs.model, *data, *RANK, "-o", output))
        assert output.read_bytes() == wanted.read_bytes(), form


def test_bad_records_are_named_all_at_once(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copy(clips_of(inputs.harmful)[0], tmp_path / "good.flac")
    (tmp_path / "noise.wav").write_bytes(b"nonsense")
    records = [f"good.flac,{TEXT}", f"noise.wav,{TEXT}", f"absent.wav,{TEXT}"]
    (tmp_path / "r.csv").write_text("\n".join(["audio,text", *records]))
    before = listing(tmp_path)
    data = ("--harmful", tmp_path / "r.csv", "--benign", inputs.benign)
    result = sarsteer("calibrate", inputs.model, *data, "-o", tmp_path / "plan.safetensors")
    assert (result.exit_code, result.stdout) == (2, "")
    head, *lines = result.stderr.splitlines()
    one_error(head, "r.csv: 2 of 3 records are bad", "--on-error skip")
    assert [line[:2] for line in lines] == ["  ", "  "]
    assert "r.csv, line 3: audio" in lines[0]
    assert "noise.wav: not a readable audio file" in lines[0]
    assert lines[1].endswith("absent.wav: no such file")
    assert listing(tmp_path) == before


def damaged(requests: Path, folder: Path) -> Path:
    """The same requests with four bad ones between them: no JSON, no file, silent, too short to be heard."""
    folder.mkdir()
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16_000)
    soundfile.write(folder / "blip.wav", np.full(300, 0.5), 16_000)
    bad = [
        "nonsense",
        *(json.dumps({"audio": f"{name}.wav", "text": TEXT}) for name in ("absent", "silent", "blip")),
    ]
    records = map(json.loads, requests.read_text().splitlines())
    good = [json.dumps({**record, "audio": str(requests.parent / record["audio"])}) for record in records]
    mixed = [line for pair in zip(good, bad, strict=False) for line in pair] + good[len(bad) :]
    (folder / "requests.jsonl").write_text("\n".join(mixed))
    return folder / "requests.jsonl"


def test_bad_records_are_skipped_and_counted(inputs: Inputs, tmp_path: Path) -> None:
    wanted, output = tmp_path / "wanted.safetensors", tmp_path / "plan.safetensors"
    answered(sarsteer("calibrate", inputs.model, *inputs.data, *RANK, "-o", wanted))
    data = ("--harmful", damaged(inputs.harmful, tmp_path / "damaged"), "--benign", inputs.benign)
    result = sarsteer("calibrate", inputs.model, *data, *RANK, "-o", output, "--on-error", "skip", "--json")
    found = answered_json(result)
    plan, expected = SteeringPlan.load(output), SteeringPlan.load(wanted)
    assert plan.digest() == expected.digest()
    assert plan.provenance["harmful"] == {**expected.provenance["harmful"], "skipped": 4}
    assert found["provenance"]["harmful"]["skipped"] == 4
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert [line.count(" skipped: ") for line in warnings] == [1, 1, 1]  # as read, by header, by sample
    for line, words in zip(warnings, ("1 of 10 records", "1 of 9 records", "2 of 8 records"), strict=True):
        assert words in line


def test_nothing_left_is_an_error(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"audio,text\nabsent.wav,{TEXT}\n")
    data = ("--harmful", tmp_path / "r.csv", "--benign", inputs.benign, "--on-error", "skip")
    result = sarsteer("calibrate", inputs.model, *data, "-o", tmp_path / "plan.safetensors")
    assert result.exit_code == 2
    one_error(result.stderr.splitlines()[0], "every one of 1 records is bad; nothing is left")


def with_transcripts(requests: Path, path: Path, *, said: str) -> Path:
    """The same clips with transcripts that begin with a word."""
    lines = [
        json.dumps({"audio": str(clip), "text": TEXT, "transcript": f"{said} {number}"})
        for number, clip in enumerate(clips_of(requests))
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> tuple[Path, Path]:
    """Harmful and benign clips that are no one's else."""
    return (
        tiny_lalm.save_requests(tmp_path / "held_out_harmful", count=2, seed=11),
        tiny_lalm.save_requests(tmp_path / "held_out_benign", count=2, seed=12),
    )


def test_held_out_clips_that_calibration_saw_are_refused(
    inputs: Inputs, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    build = (*inputs.quick_build, "-o", tmp_path / "bundle", "--dry-run")
    for allowed in ((), ("--allow-overlap", "transcripts")):
        result = sarsteer(*build, "--eval-harmful", inputs.harmful, "--eval-benign", held_out[1], *allowed)
        assert result.exit_code == 2
        head, first, *_ = result.stderr.splitlines()
        one_error(head, "6 of 8 test requests are clips that calibration saw")
        assert first == f"  {inputs.harmful}, line 1: the clip of {inputs.harmful}, line 1"
    data = ("--eval-harmful", held_out[0], "--eval-benign", held_out[1])
    assert "calibrate" in answered(sarsteer(*build, *data))


def test_a_build_refuses_words_that_calibration_heard_or_says_so_and_counts_what_it_skips(
    inputs: Inputs, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    heard = with_transcripts(inputs.harmful, tmp_path / "harmful.jsonl", said="steal")
    tested = with_transcripts(held_out[0], tmp_path / "tested.jsonl", said=" STEAL,")
    given = list(inputs.quick_build)
    given[given.index(inputs.harmful)] = damaged(heard, tmp_path / "damaged")
    build = (*given, "--eval-harmful", tested, "--eval-benign", held_out[1], "--max-new-tokens", "2")
    build = (*build, "-o", tmp_path / "bundle", "--on-error", "skip")
    result = sarsteer(*build)
    assert result.exit_code == 2
    assert "Error: 2 of 4 test requests say what calibration heard" in result.stderr
    (tmp_path / "build.toml").write_text('allow-overlap = "transcripts"\n')
    result = sarsteer(*build, "--config", tmp_path / "build.toml")
    assert "requests that calibration saw: 0 by clip, 2 by transcript, which was allowed" in answered(result)
    assert "warning: calibration saw test requests: 0 by clip, 2 by transcript, of 4" in result.stderr
    report = json.loads((tmp_path / "bundle" / BEHAVIOUR_REPORT).read_text())
    assert report["overlap"] == {"clips": 0, "transcripts": 2}
    again = answered_json(sarsteer(*build, "--allow-overlap", "transcripts", "--json"))
    assert set(again["reused"]) == {"calibrate", "export", "verify"}
    assert again["behaviour"] == report
    assert (again["data"]["harmful"]["count"], again["data"]["harmful"]["skipped"]) == (6, 4)
    assert again["data"]["eval_harmful"] == {"count": 2, "skipped": 0}


def test_verify_skips_too(inputs: Inputs, bundle_path: Path, tmp_path: Path) -> None:
    requests = ("--requests", damaged(inputs.harmful, tmp_path / "damaged"))
    verify = (
        "verify",
        bundle_path,
        "--model",
        inputs.model,
        *requests,
        "--prompts",
        "2",
        "--decode-steps",
        "1",
    )
    answered(sarsteer(*verify, "--on-error", "skip"))
    refused(sarsteer(*verify), "line 2: not JSON")


def test_a_plan_remembers_what_it_was_calibrated_on(
    inputs: Inputs, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.safetensors"
    answered(sarsteer("calibrate", inputs.model, *inputs.data, *RANK, "-o", plan))
    assert "seen: 11 clips, 0 transcripts" in answered(sarsteer("inspect", plan))
    # the requests that are given beside a plan serve parity alone, so that they may be those of the test
    given = (
        "--harmful",
        held_out[0],
        "--benign",
        held_out[1],
        "--plan",
        plan,
        "--dry-run",
        "-o",
        tmp_path / "b",
    )
    build = ("build", inputs.model, *given, "--prompts", "2")
    result = sarsteer(*build, "--eval-harmful", held_out[0], "--eval-benign", inputs.benign)
    assert result.exit_code == 2
    head, first, *_ = result.stderr.splitlines()
    one_error(head, "5 of 7 test requests are clips that calibration saw")
    assert first == f"  {inputs.benign}, line 1: the clip of the plan's calibration"
    answered(sarsteer(*build, "--eval-harmful", held_out[0], "--eval-benign", held_out[1]))


def test_one_set_may_not_be_both(inputs: Inputs, tmp_path: Path) -> None:
    data = ("--harmful", inputs.benign, "--benign", inputs.benign)
    for command in (
        ("calibrate", inputs.model, "-o", tmp_path / "p"),
        ("build", inputs.model, "-o", tmp_path / "b"),
    ):
        result = sarsteer(*command, *data)
        assert result.exit_code == 2
        one_error(
            result.stderr.splitlines()[0], "5 of 5 benign requests are clips that are harmful ones, too"
        )
    assert not listing(tmp_path)


def test_options_that_cannot_be_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    command = ("calibrate", inputs.model, *inputs.data, "-o", tmp_path / "p")
    refused(sarsteer(*command, "--prompt", ""), "--prompt is empty")
    refused(sarsteer(*command, "--audio-column", ""), "--audio-column is empty")
    assert "6 of 6 records are bad" in sarsteer(*command, "--text-column", "ask").stderr
    refused(sarsteer(*command, "--on-error", "ignore"), "'ignore' is not one of 'stop', 'skip'")


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 that hears nothing."""
    folder = tmp_path_factory.mktemp("text_model")
    tokenizer = tiny_lalm.build_processor().tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_hears_nothing_is_calibrated_on_text_alone(
    text_checkpoint: Path, inputs: Inputs, tmp_path: Path
) -> None:
    for kind in ("harmful", "benign"):
        lines = ["text", *(f"please {kind} {number}" for number in range(4))]
        (tmp_path / f"{kind}.csv").write_text("\n".join(lines))
    data = ("--harmful", tmp_path / "harmful.csv", "--benign", tmp_path / "benign.csv")
    output = tmp_path / "plan.safetensors"
    answered(sarsteer("calibrate", text_checkpoint, *data, *RANK, "-o", output))
    provenance = SteeringPlan.load(output).provenance
    assert provenance["harmful"]["count"] == 4
    assert (len(provenance["seen"]["clips"]), len(provenance["seen"]["transcripts"])) == (0, 8)
    result = sarsteer("calibrate", text_checkpoint, *inputs.data, "-o", tmp_path / "p")
    assert "the model hears no audio; expected a record of text alone" in result.stderr
    refused(
        sarsteer("calibrate", inputs.model, *data, "-o", tmp_path / "p"),
        "harmful.csv: its header has no column 'audio'",
    )
