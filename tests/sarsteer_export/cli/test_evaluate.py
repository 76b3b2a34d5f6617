"""`evaluate` on the tiny bundle and its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from click.testing import Result

from calibration.plan import SteeringPlan
from sarsteer_export import EvaluationSettings, MeasureSettings, evaluate
from sarsteer_export.bundle.manifest import PLAN, UNSTEERED_DECODER
from sarsteer_export.evaluation.figures import FIGURES
from sarsteer_export.evaluation.intervals import Bootstrap
from tests import tiny_lalm
from tests.sarsteer_export.command_line import (
    answered,
    answered_json,
    listing,
    refused,
    run_python,
    sarsteer,
)
from tests.sarsteer_export.conftest import Inputs

QUICK = ("--max-new-tokens", "3", "--random-seeds", "0", "--limit", "3", "--bootstrap", "200")
FILES = ["outputs.jsonl", "results.json", "results.md", "results.svg"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Requests that the bundle's plan was not calibrated on."""
    folder = tmp_path_factory.mktemp("held_out")
    kinds = {
        kind: tiny_lalm.save_requests(folder / kind, count=4, seed=seed)
        for kind, seed in (("harmful", 11), ("benign", 12))
    }
    return ("--harmful", kinds["harmful"], "--benign", kinds["benign"])


@pytest.fixture(scope="module")
def evaluated(
    bundle_path: Path,
    inputs: Inputs,
    held_out: tuple[str | Path, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Result]:
    """A bundle with its checkpoint, everything at its defaults but for size: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluated") / "results"
    seeds = ("--random-seeds", "0,1", "--max-new-tokens", "3", "--bootstrap", "200")
    call = ("evaluate", bundle_path, "--model", inputs.model, *held_out, *seeds, "-o", folder)
    return folder, sarsteer(*call, "--json")


def test_systems_stand_side_by_side_on_both_runtimes(evaluated: tuple[Path, Result]) -> None:
    found = answered_json(evaluated[1])
    names = [(row["system"], row["kind"], row["runtime"], len(row["plans"])) for row in found["systems"]]
    assert names == [
        (system, kind, runtime, plans)
        for runtime in ("eager", "onnxruntime-cpu")
        for system, kind, plans in (
            ("undefended", "undefended", 1),
            ("steered", "steered", 1),
            ("random, steered", "random control", 2),
        )
    ]
    for row in found["systems"]:
        figures = row["figures"]
        assert set(figures) == {figure.name for figure in FIGURES} | (
            set() if row["system"] == "undefended" else {"kl"}
        )
        for kind in ("harmful", "benign"):
            of_kind = [figures[figure.name]["value"] for figure in FIGURES if figure.requests == kind]
            assert sum(of_kind) == pytest.approx(1.0, abs=1e-12)
        for figure in figures.values():
            assert figure["bootstrap"]["low"] <= figure["value"] <= figure["bootstrap"]["high"]
            assert figure["prompts"] == 4
        assert (row["differences"] is None) is (row["system"] == "undefended")
    assert found["judge"]["kind"] == "strings"
    assert found["target"]["engine"] == "onnxruntime-cpu"
    assert found["requests"]["harmful"]["count"] == 4


def test_steering_does_more_damage_than_random_directions_of_its_size(evaluated: tuple[Path, Result]) -> None:
    kl = {
        (row["system"], row["runtime"]): row["figures"]["kl"]["value"]
        for row in answered_json(evaluated[1])["systems"]
        if "kl" in row["figures"]
    }
    for runtime in ("eager", "onnxruntime-cpu"):
        assert kl["steered", runtime] > kl["random, steered", runtime] > 0.001
    # two float32 runs of one model: see KL_RTOL in test_measure
    assert kl["steered", "eager"] == pytest.approx(kl["steered", "onnxruntime-cpu"], rel=1e-3)


def test_eager_and_engine_are_compared_prompt_by_prompt(evaluated: tuple[Path, Result]) -> None:
    agreements = answered_json(evaluated[1])["agreement"]
    assert [(found["system"], found["total"], found["identical"]) for found in agreements] == [
        ("undefended", 8, 8),
        ("steered", 8, 8),
        ("random, steered", 16, 16),
    ]
    assert all(found["different"] == [] for found in agreements)


def test_the_folder_holds_results_picture_and_every_output(evaluated: tuple[Path, Result]) -> None:
    folder, result = evaluated
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == answered_json(result)
    records = [
        json.loads(line) for line in (folder / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 2 * (1 + 1 + 2) * 8
    assert {record["verdict"] for record in records} <= {"refusal", "answer", "degenerate"}
    assert {record["runtime"] for record in records} == {"eager", "onnxruntime-cpu"}
    steered = [record for record in records if record["system"] == "steered"]
    plain = [record for record in records if record["system"] == "undefended"]
    assert [record["output"] for record in steered] != [record["output"] for record in plain]
    picture = ElementTree.fromstring((folder / "results.svg").read_text(encoding="utf-8"))  # noqa: S314 - ours
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(picture.itertext())
    assert "random, steered, eager: harmful: attack success" in text
    assert "prefers-color-scheme: dark" in text
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == 2 + 6
    assert "Wilson" in page


def test_the_table_has_a_line_per_system_and_says_what_its_intervals_are(
    bundle_path: Path, held_out: tuple[str | Path, ...]
) -> None:
    text = answered(sarsteer("evaluate", bundle_path, *held_out, *QUICK))
    blocks = text.split("\n\n")
    assert [len(block.splitlines()) for block in blocks[:2]] == [4, 4]
    assert "attack success" in blocks[0]
    assert "KL, nats per token" in blocks[1]
    assert "95% intervals, percentile bootstrap over prompts (200 resamples, seed 0)" in text
    assert "eager" not in text


def test_a_checkpoint_is_evaluated_with_plans_also_spread_over_devices(
    inputs: Inputs, bundle_path: Path, held_out: tuple[str | Path, ...]
) -> None:
    plan = bundle_path / PLAN
    call = ("evaluate", inputs.model, *held_out, *QUICK, "--plan", f"ours={plan}")
    found = answered_json(sarsteer(*call, "--json"))
    assert [row["system"] for row in found["systems"]] == ["undefended", "ours", "random, ours"]
    assert found["agreement"] == []
    assert found["plans"] == {"ours": SteeringPlan.load(plan).digest()}
    loading = {"plans": {"ours": plan}, "random_seeds": (), "limit": 3, "device_map": tiny_lalm.SPLIT}
    size = {"measure": MeasureSettings(max_new_tokens=3), "bootstrap": Bootstrap(resamples=200)}
    spread = evaluate(inputs.model, EvaluationSettings(*held_out[1::2], **loading, **size)).to_json()
    assert [row["figures"] for row in spread["systems"]] == [row["figures"] for row in found["systems"][:2]]


def test_a_checkpoint_without_a_plan_is_measured_undefended_alone(
    inputs: Inputs, bundle_path: Path, held_out: tuple[str | Path, ...], tmp_path: Path
) -> None:
    call = ("evaluate", inputs.model, *held_out, *QUICK)
    folder = tmp_path / "results"
    found = answered_json(sarsteer(*call, "-o", folder, "--json"))
    beside_a_plan = answered_json(sarsteer(*call, "--plan", bundle_path / PLAN, "--json"))
    assert found["systems"] == beside_a_plan["systems"][:1]
    assert "kl" not in found["systems"][0]["figures"]
    assert (found["plans"], found["overlap"], found["agreement"]) == ({}, {}, [])
    assert not any("random" in note for note in found["notes"])
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert len((folder / "outputs.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    text = "".join(ElementTree.fromstring((folder / "results.svg").read_text(encoding="utf-8")).itertext())  # noqa: S314 - ours
    assert "undefended, eager: harmful: attack success" in text
    assert "KL" not in text  # no empty axes of damage
    assert "and damage by system" not in text + (folder / "results.md").read_text(encoding="utf-8")
    table = answered(sarsteer(*call))
    assert [len(block.splitlines()) for block in table.split("\n\n")[:2]] == [2, 2]


def test_a_bundle_without_an_unsteered_decoder_is_asked_what_it_can_be(
    bundle_copy: Path, held_out: tuple[str | Path, ...]
) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text(encoding="utf-8"))
    (bundle_copy / UNSTEERED_DECODER).unlink()
    del manifest["files"][UNSTEERED_DECODER.as_posix()]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = answered_json(sarsteer("evaluate", bundle_copy, *held_out, *QUICK, "--json"))
    assert [row["system"] for row in found["systems"]] == ["steered"]
    assert "kl" not in found["systems"][0]["figures"]
    (note,) = [note for note in found["notes"] if "holds no unsteered decoder" in note]
    assert "undefended; random, steered" in note


def test_a_label_names_the_plan_that_the_bundle_holds(
    bundle_path: Path, held_out: tuple[str | Path, ...]
) -> None:
    plan = ("--plan", f"SARSteer={bundle_path / PLAN}", "--random-seeds", "none")
    found = answered_json(sarsteer("evaluate", bundle_path, *held_out, *QUICK, *plan, "--json"))
    assert [row["system"] for row in found["systems"]] == ["undefended", "SARSteer"]


def test_refusal_phrases_of_the_user_change_the_verdicts(
    bundle_path: Path, held_out: tuple[str | Path, ...], tmp_path: Path
) -> None:
    letters = tmp_path / "phrases.txt"
    letters.write_text("\n".join("abcdefghijklmnopqrstuvwxyz0123456789 "), encoding="utf-8")
    call = ("evaluate", bundle_path, *held_out, *QUICK, "--random-seeds", "none", "--json")
    plain = answered_json(sarsteer(*call))
    ours = answered_json(sarsteer(*call, "--refusal-phrases", letters))
    assert (
        ours["systems"][0]["figures"]["refused"]["value"] > plain["systems"][0]["figures"]["refused"]["value"]
    )
    assert ours["judge"]["phrases_sha256"] != plain["judge"]["phrases_sha256"]


def test_bad_input_is_refused_and_nothing_is_written(
    bundle_path: Path,
    inputs: Inputs,
    other_checkpoint: Path,
    held_out: tuple[str | Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = ("evaluate", bundle_path, *held_out, *QUICK, "-o", tmp_path / "results")
    plan = bundle_path / PLAN
    refused(sarsteer(*call, "--model", other_checkpoint), "was made from another checkpoint")
    refused(sarsteer(*call, "--model", tmp_path / "none"), "no such directory")
    refused(sarsteer(*call, "--dtype", "float16"), "is a bundle in float32")
    refused(sarsteer(*call, "--plan", "undefended=" + str(plan)), "the label 'undefended' is taken")
    refused(sarsteer(*call, "--plan", f"a={plan}", "--plan", f"a={plan}"), "the label 'a' is taken")
    refused(sarsteer(*call, "--decoder", "model.layers"), "--decoder is about a checkpoint")
    refused(sarsteer(*call, "--device-map", "auto"), "--device-map is about a checkpoint")
    refused(sarsteer(*call, "--random-seeds", "0,x"), "are no numbers")
    refused(sarsteer(*call, "--random-seeds", "1,1"), "expected different numbers")
    refused(sarsteer(*call, "--bootstrap", "5"), "expected 100 to")
    refused(sarsteer(*call, "--limit", "0"), "--limit is 0")
    refused(sarsteer(*call, "--judge-url", "http://127.0.0.1:9/v1"), "--judge-model-name")
    unreachable = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model-name", "m", "--judge-attempts", "1")
    refused(sarsteer(*call, *unreachable), "could not be reached", code=3)
    model = ("evaluate", inputs.model, *held_out, *QUICK)
    with monkeypatch.context() as without:
        without.setattr("calibration.placement.find_spec", lambda name: None)
        refused(sarsteer(*model, "--plan", plan, "--device-map", "auto"), "needs accelerate", code=3)
    refused(sarsteer(*model, "--plan", plan, "--model", inputs.model), "is a checkpoint itself")
    for engine in ("onnxruntime-cpu", "onnxruntime-cuda"):  # the default too, where somebody asks for it
        refused(sarsteer(*model, "--plan", plan, "--engine", engine), f"--engine {engine} runs a bundle")
    refused(sarsteer("evaluate", tmp_path, *held_out), "config.json cannot be read")
    with monkeypatch.context() as without:
        without.setattr("sarsteer_export.bundle.frontend.PROCESSOR", Path("none.json"))
        refused(sarsteer(*call), "none.json: holds no settings")  # said once, not of every record
        before = sarsteer(*call, "--model", inputs.model)
        refused(before, "none.json: holds no settings")
        assert "evaluate: " not in before.stderr
    assert list(tmp_path.iterdir()) == []


def test_requests_that_calibration_saw_are_refused_unless_allowed(bundle_path: Path, inputs: Inputs) -> None:
    call = ("evaluate", bundle_path, *inputs.data, *QUICK, "--random-seeds", "none", "--json")
    result = sarsteer(*call)
    assert result.exit_code == 2
    assert "clips that calibration saw" in result.stderr
    allowed = answered_json(sarsteer(*call, "--allow-overlap", "all"))
    assert allowed["overlap"]["steered"]["clips"] == 6
    assert any("requests that calibration saw: 6 by clip" in note for note in allowed["notes"])


def test_results_are_replaced_only_when_told_and_only_when_they_are_ours(
    evaluated: tuple[Path, Result], bundle_path: Path, held_out: tuple[str | Path, ...], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "results"))
    before = listing(folder)
    call = ("evaluate", bundle_path, *held_out, *QUICK, "--random-seeds", "none", "-o", folder)
    refused(sarsteer(*call), "exists; use --overwrite")
    assert listing(folder) == before
    answered(sarsteer(*call, "--overwrite"))
    assert sorted(listing(folder)) == FILES
    assert listing(folder) != before
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    refused(sarsteer(*call, "--overwrite"), "holds notes.txt")


def test_a_bundle_alone_is_evaluated_without_pytorch(
    bundle_path: Path, held_out: tuple[str | Path, ...]
) -> None:
    code = (
        "import sys\n"
        "from sarsteer_export.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    plain = ("--random-seeds", "none", "--limit", "1", "--max-new-tokens", "2")
    done = run_python(code, "evaluate", bundle_path, *held_out, *plain)
    assert done.returncode == 0, done.stderr
    assert "attack success" in done.stdout


def test_a_bundle_alone_skips_and_counts_clips_it_makes_nothing_of(
    bundle_path: Path, held_out: tuple[str | Path, ...], tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "blip.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 50), 16_000)
    harmful = Path(held_out[1])
    records = [json.loads(line) for line in harmful.read_text(encoding="utf-8").splitlines()]
    records = [{**record, "audio": str(harmful.parent / record["audio"])} for record in records]
    records[1]["audio"] = str(tmp_path / "blip.wav")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    quick = ("--max-new-tokens", "1", "--random-seeds", "0", "--bootstrap", "100")
    call = ("evaluate", bundle_path, "--harmful", mixed, *held_out[2:], *quick)
    refused(sarsteer(*call), "line 2", "blip.wav: too short, 50 samples at 16000 Hz")
    found = answered_json(sarsteer(*call, "--on-error", "skip", "--json"))["requests"]["harmful"]
    assert (found["count"], found["skipped"]) == (3, 1)
