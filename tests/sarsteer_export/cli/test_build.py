"""`build`: a complete, proven bundle or nothing; and what a second build does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import onnx
import pytest
from click.testing import Result

import engines.limits
from calibration.plan import Positions, SteeringPlan
from sarsteer_export import JudgeSettings, load_bundle
from sarsteer_export.bundle.manifest import (
    AUDIO_ENCODER,
    BEHAVIOUR_REPORT,
    CHAT_TEMPLATE,
    EMBED_TOKENS,
    MANIFEST,
    ONNX_FOLDER,
    PARITY_PAGE,
    PARITY_REPORT,
    PLAN,
    PROCESSOR,
    STEERED_DECODER,
    TOKENIZER,
    UNSTEERED_DECODER,
    Manifest,
    file_sha256,
)
from tests.sarsteer_export.command_line import answered, answered_json, listing, one_error, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs

PARTS = (
    *(CHAT_TEMPLATE, PROCESSOR, TOKENIZER, PLAN, PARITY_REPORT, PARITY_PAGE, BEHAVIOUR_REPORT),
    *(STEERED_DECODER, UNSTEERED_DECODER, AUDIO_ENCODER, EMBED_TOKENS),
    *(file.with_name(f"{file.name}_data") for file in (STEERED_DECODER, AUDIO_ENCODER, EMBED_TOKENS)),
)


def test_a_bundle_holds_every_part_and_its_manifest_names_every_file(bundle_path: Path) -> None:
    manifest = json.loads((bundle_path / MANIFEST).read_text(encoding="utf-8"))
    present = {name for name, kind in listing(bundle_path).items() if kind != "folder"}
    assert {part.as_posix() for part in PARTS} <= present
    assert set(manifest["files"]) == present - {MANIFEST}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_sha256(bundle_path / name)
        assert entry["bytes"] == (bundle_path / name).stat().st_size
    assert list(bundle_path.parent.iterdir()) == [bundle_path], "a staging folder was left behind"


def test_a_bundle_holds_regular_files_alone(bundle_path: Path) -> None:
    for path in bundle_path.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
        assert path.lstat().st_nlink == 1 or path.is_dir(), f"{path} is a hard link"
        assert mode & 0o444 == 0o444, f"{path} cannot be read by everyone"


def test_a_bundle_says_nothing_of_the_machine_it_was_built_on(bundle_path: Path, inputs: Inputs) -> None:
    for path in bundle_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (inputs.model, inputs.harmful.parent, bundle_path, Path(__file__).parents[3]):
                assert str(place).encode() not in content, f"{path} names {place}"


def test_the_manifest_maps_each_edit_to_the_graph(bundle_path: Path, plan: SteeringPlan) -> None:
    manifest = json.loads((bundle_path / MANIFEST).read_text(encoding="utf-8"))
    graph = answered_json(sarsteer("inspect", bundle_path / STEERED_DECODER, "--json"))
    assert [edit["layer"] for edit in manifest["edits"]] == [edit.layer for edit in plan.edits]
    outputs = {block["index"]: block["output"] for block in graph["stream"]["blocks"]}
    constants = {constant["name"] for constant in graph["steering"]}
    for edit in manifest["edits"]:
        assert edit["anchor"] == outputs[edit["layer"]]
        assert set(edit["constants"]) & constants
    assert manifest["plan_sha256"] == plan.digest()
    decoder = manifest["graphs"][STEERED_DECODER.as_posix()]
    assert [port["name"] for port in decoder["inputs"]] == [port["name"] for port in graph["inputs"]]


def test_a_build_proves_itself(build_result: tuple[Path, Result], bundle_path: Path) -> None:
    found = answered_json(build_result[1])
    assert found["bundle"] == str(bundle_path)
    assert found["reused"] == []
    parity = found["parity"]
    assert parity["verdict"] == "passed"
    assert [case["case"] for case in parity["cases"]] == ["left padding", "right padding"]
    for case in parity["cases"]:
        names = {control["name"] for control in case["controls"]}
        everywhere = {"unsteered", "wrong sign", "wrong positions", "wrong layer"}
        right_only = {"last column instead of last attended"} if case["case"] == "right padding" else set()
        assert names == everywhere | right_only
        assert all(control["caught"] for control in case["controls"])
        assert len(case["logits_difference"]) == 1 + 3
        figures = {item["what"] for item in case["measurements"]}
        assert {"KV cosine", "block cosine", "logits effect cosine", "logits KL"} <= figures
    report = json.loads((bundle_path / PARITY_REPORT).read_text(encoding="utf-8"))
    assert report["table"].endswith("verdict: passed")
    assert {name: report[name] for name in parity} == parity


def test_a_build_measures_behaviour_when_it_is_given_requests(
    build_result: tuple[Path, Result], bundle_path: Path
) -> None:
    behaviour = answered_json(build_result[1])["behaviour"]
    kinds = [(row["requests"], row["system"], row["runtime"], row["count"]) for row in behaviour["rows"]]
    assert kinds == [
        (kind, system, runtime, count)
        for kind, count in (("harmful", 6), ("benign", 5))
        for system in ("undefended", "steered")
        for runtime in ("eager", "onnxruntime-cpu")
    ]
    assert all(
        row["refusals"] + row["answers"] + row["degenerate"] == row["count"] for row in behaviour["rows"]
    )
    assert behaviour["identical"] == {"undefended": 1.0, "steered": 1.0}
    report = json.loads((bundle_path / BEHAVIOUR_REPORT).read_text(encoding="utf-8"))
    *rows, overlap = report["table"].splitlines()
    assert len(rows) == 1 + 8 + 2
    assert report["overlap"] == {"clips": 11, "transcripts": 0}
    assert overlap == "requests that calibration saw: 11 by clip, 0 by transcript, which was allowed"
    assert report["rows"] == behaviour["rows"]
    assert report["judge"] == JudgeSettings().identity()


def test_a_second_build_with_the_same_inputs_does_nothing(bundle_path: Path, inputs: Inputs) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle_path.rglob("*")}
    text = answered(sarsteer(*inputs.build, "-o", bundle_path))
    assert "reused: calibrate, export, verify\n" in text
    assert "verdict: passed\n" in text
    assert "eager and engine say the same, steered: 100.0%\n" in text
    assert text.endswith(f"bundle: {bundle_path}\n")
    assert {path: path.stat().st_mtime_ns for path in bundle_path.rglob("*")} == before


def test_changed_inputs_need_overwrite_and_reuse_what_did_not_change(
    bundle_copy: Path, inputs: Inputs
) -> None:
    before = listing(bundle_copy)
    given = (*inputs.quick_build, "--alpha", "1.5", "-o", bundle_copy)
    refused(sarsteer(*given), str(bundle_copy), "exists", "--overwrite")
    assert listing(bundle_copy) == before
    dry = answered_json(sarsteer(*given, "--overwrite", "--dry-run", "--json"))
    assert dry["steps"] == [["calibrate", "run"], ["export", "reused"], ["verify", "run"]]
    found = answered_json(sarsteer(*given, "--overwrite", "--json"))
    assert found["reused"] == ["export"]
    assert {edit.strength for edit in SteeringPlan.load(bundle_copy / PLAN).edits} == {1.5}
    after = listing(bundle_copy)
    kept = {name for name in after if after[name] == before.get(name) != "folder"}
    assert {UNSTEERED_DECODER.as_posix(), AUDIO_ENCODER.as_posix(), TOKENIZER.as_posix()} <= kept
    assert not {STEERED_DECODER.as_posix(), PLAN.as_posix(), PARITY_REPORT.as_posix()} & kept
    assert list(bundle_copy.parent.iterdir()) == [bundle_copy]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(bytes(content))


def test_an_altered_bundle_is_not_up_to_date(bundle_copy: Path, inputs: Inputs) -> None:
    flip_last_byte(bundle_copy / CHAT_TEMPLATE)
    before = listing(bundle_copy)
    result = sarsteer(*inputs.build, "-o", bundle_copy)
    refused(result, "exists", "--overwrite")
    assert f"warning: {bundle_copy / CHAT_TEMPLATE}: was altered since it was built" in result.stderr
    assert listing(bundle_copy) == before
    stowaway = bundle_copy / ONNX_FOLDER / "stowaway.onnx"
    stowaway.write_bytes(b"payload")
    again = (*inputs.quick_build, "-o", bundle_copy, "--overwrite", "--json")
    refused(sarsteer(*again), "holds onnx/stowaway.onnx", "it is not replaced")
    stowaway.unlink()
    assert answered_json(sarsteer(*again))["reused"] == ["calibrate", "export"]
    load_bundle(bundle_copy).manifest.check_hashes(bundle_copy)


@pytest.mark.parametrize(
    ("altered", "reused"),
    [(PLAN, ["export"]), (AUDIO_ENCODER, ["calibrate"]), (STEERED_DECODER, ["calibrate", "export"])],
)
def test_a_stage_whose_files_were_altered_is_not_reused(
    bundle_copy: Path, bundle_path: Path, inputs: Inputs, altered: Path, reused: list[str]
) -> None:
    flip_last_byte(bundle_copy / altered)
    result = sarsteer(*inputs.build, "-o", bundle_copy, "--overwrite", "--json", "--dry-run")
    steps = dict(answered_json(result)["steps"])
    assert [stage for stage, fate in steps.items() if fate == "reused"] == reused
    assert steps["verify"] == "run"
    if altered == PLAN:  # one real build: what was altered is computed anew and is what it was
        found = answered_json(sarsteer(*inputs.quick_build, "-o", bundle_copy, "--overwrite", "--json"))
        assert found["reused"] == reused
        assert (bundle_copy / PLAN).read_bytes() == (bundle_path / PLAN).read_bytes()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    given = (*inputs.build, "-o", tmp_path / "new" / "bundle", "--dry-run")
    text = answered(sarsteer(*given))
    assert [line.split()[:2] for line in text.splitlines()[:3]] == [
        ["calibrate", "run"],
        ["export", "run"],
        ["verify", "run"],
    ]
    for word in ("parameters", "disk", "memory"):
        assert f"\n{word} " in text
    found = answered_json(sarsteer(*given, "--json"))
    parameters = found["parameters"]
    assert parameters > 100_000
    assert 4 * parameters < found["disk_bytes"] < 4 * parameters + 10_000_000
    assert found["memory_bytes"] >= 8 * parameters
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "processor_config.json", "generation_config.json"]
)
def test_a_changed_processor_file_makes_every_stage_run_again(
    name: str, bundle_copy: Path, inputs: Inputs, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs.model, model)
    given = ("build", model, *inputs.build[2:], "-o", bundle_copy, "--overwrite", "--dry-run", "--json")
    assert {fate for _, fate in answered_json(sarsteer(*given))["steps"]} == {"up to date"}
    (model / name).write_text((model / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert {fate for _, fate in answered_json(sarsteer(*given))["steps"]} == {"run"}


def test_a_dry_run_refuses_what_shows_without_loading_the_model(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    tail = ("-o", place / "bundle", "--dry-run")
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"audio": "absent.flac", "text": "hear"}\n', encoding="utf-8")
    head = ("build", inputs.model)
    refused(
        sarsteer(*head, "--harmful", requests, "--benign", inputs.benign, *tail),
        "absent.flac",
        "no such file",
    )
    (tmp_path / "absent.flac").write_text("no audio", encoding="utf-8")
    refused(
        sarsteer(*head, "--harmful", requests, "--benign", inputs.benign, *tail),
        "absent.flac",
        "not a readable",
    )
    single = inputs.benign.with_name("single.jsonl")
    single.write_text(inputs.benign.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    refused(sarsteer(*head, "--harmful", inputs.harmful, "--benign", single, *tail), "1 benign", "at least 2")
    single.unlink()
    full = shutil.disk_usage(place)._replace(free=1_000)
    monkeypatch.setattr("sarsteer_export.building.space.shutil.disk_usage", lambda _path: full)
    refused(sarsteer(*head, *inputs.data, *tail), "needs about", "are free there")
    assert listing(place) == {}


def test_a_dry_run_over_a_finished_bundle_says_so(bundle_path: Path, inputs: Inputs) -> None:
    found = answered_json(sarsteer(*inputs.build, "-o", bundle_path, "--dry-run", "--json"))
    assert {fate for _, fate in found["steps"]} == {"up to date"}


def test_a_given_plan_is_used_as_it_is(bundle_copy: Path, inputs: Inputs, plan: SteeringPlan) -> None:
    given = SteeringPlan(plan.hidden_size, plan.num_layers, plan.edits[1:2], plan.provenance)
    given.save(bundle_copy.parent / "mine.safetensors")
    options = ("--plan", bundle_copy.parent / "mine.safetensors", "--no-unsteered", "--prompts", "1")
    head = ("build", inputs.model, *inputs.data, *options, "-o", bundle_copy, "--overwrite")
    result = sarsteer(*head, "--json")
    found = answered_json(result)
    assert found["reused"] == ["export"]
    assert found["behaviour"] is None
    assert "harmful: " not in result.stderr, "it calibrated all the same"
    assert SteeringPlan.load(bundle_copy / PLAN) == given
    assert not (bundle_copy / UNSTEERED_DECODER).exists()
    with load_bundle(bundle_copy) as bundle:
        assert not bundle.has_unsteered
        assert len(bundle.manifest.edits) == 1
    assert "reused: calibrate, export, verify\n" in answered(sarsteer(*head)), (
        "the same build again does nothing"
    )


def test_positions_that_a_bundle_is_not_told_are_refused_before_any_work(
    inputs: Inputs, plan: SteeringPlan, tmp_path: Path
) -> None:
    edits = (dataclasses.replace(plan.edits[0], positions=Positions.first(3)),)
    dataclasses.replace(plan, edits=edits).save(tmp_path / "plan.safetensors")
    given = (
        "build",
        inputs.model,
        *inputs.data,
        "--plan",
        tmp_path / "plan.safetensors",
        "-o",
        tmp_path / "bundle",
    )
    refused(sarsteer(*given), "edit 0", "'first:3'", "patch --prompt-from input", code=3)
    assert list(listing(tmp_path)) == ["plan.safetensors"]


def test_a_plan_for_another_model_is_refused_before_anything_is_exported(
    bundle_path: Path, inputs: Inputs, other_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it exported")

    monkeypatch.setattr("sarsteer_export.pipeline.export_components", refuse)
    given = ("build", other_checkpoint, *inputs.data, "--plan", bundle_path / PLAN, "-o", tmp_path / "bundle")
    refused(sarsteer(*given), "made for another model", "--force")
    assert listing(tmp_path) == {}
    forced = sarsteer(*given, "--force", "--debug")
    assert isinstance(forced.exception, AssertionError), "--force did not get past the check"


def test_when_parity_fails_nothing_is_written_and_the_figures_are_named(
    bundle_copy: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("onnxruntime-cpu", "float32")
    strict = _replaced(engines.limits.LIMITS[key], effect_ratio=0.0)
    monkeypatch.setitem(engines.limits.LIMITS, key, strict)
    before = listing(bundle_copy.parent)
    result = sarsteer(*inputs.quick_build, "--alpha", "1.5", "-o", bundle_copy, "--overwrite")
    assert result.exit_code == 6
    assert result.stdout == ""
    error = result.stderr[result.stderr.index("Error: ") :].splitlines()
    assert error[0].endswith("nothing was written:")
    assert error[1:], "no figure is named"
    assert all(line.startswith("  ") for line in error[1:])
    assert any("effect norm ratio" in line and "limit 0" in line for line in error[1:])
    assert listing(bundle_copy.parent) == before


def test_when_the_export_itself_is_wrong_nothing_is_patched(
    bundle_copy: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("onnxruntime-cpu", "float32")
    monkeypatch.setitem(engines.limits.LIMITS, key, _replaced(engines.limits.LIMITS[key], max_abs=0.0))
    before = listing(bundle_copy.parent)
    result = sarsteer(*inputs.quick_build, "--alpha", "1.5", "-o", bundle_copy, "--overwrite")
    assert result.exit_code == 6
    one_error(result.stderr, "the unsteered export does not agree with the eager model", "limit 0")
    assert listing(bundle_copy.parent) == before


def _replaced(limits: engines.limits.Limits, **changes: float) -> engines.limits.Limits:
    return dataclasses.replace(limits, **changes)


def test_one_eval_file_alone_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    given = ("build", inputs.model, *inputs.data, "-o", tmp_path / "bundle", "--eval-harmful", inputs.harmful)
    refused(sarsteer(*given), "--eval-benign")
    assert listing(tmp_path) == {}


def test_bfloat16_is_proven_by_its_float32_twin(inputs: Inputs, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no bfloat16 products; the report says what was compared instead."""
    bundle = tmp_path / "bundle"
    build = (*inputs.quick_build, "--dtype", "bfloat16", "--engine", "tensorrt-rtx", "-o", bundle)
    answer = answered_json(sarsteer(*build, "--max-batch", "2", "--no-unsteered", "--json"))
    assert answer["parity"]["verdict"] == "passed"
    assert answer["parity"]["precision"] == "float32 twin of bfloat16"
    assert any("bfloat16 arithmetic is not" in note for note in answer["parity"]["notes"])
    assert [(entry["precision"], entry["verdict"]) for entry in answer["engines"]] == [
        ("bfloat16", "built, not executed")
    ]
    manifest = Manifest.read(bundle)
    assert manifest.model["dtype"] == "bfloat16"
    assert manifest.parity["precision"] == "float32 twin of bfloat16"
    graph = onnx.load(bundle / STEERED_DECODER, load_external_data=False)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert not list(tmp_path.glob(".*")), "the twin was left behind"
    refused(sarsteer("run", bundle, "--text", "hello"), "no bfloat16 products", "tensorrt-rtx", code=3)
    verify = ("verify", bundle, "--model", inputs.model, "--requests", inputs.harmful, "--prompts", "2")
    again = answered_json(sarsteer(*verify, "--json"))
    assert (again["verdict"], again["precision"]) == ("passed", "float32 twin of bfloat16")


def test_no_room_on_the_disk_is_seen_before_any_work(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type(usage)(usage.total, usage.total - 10, 10))
    given = ("build", inputs.model, *inputs.data, "-o", tmp_path / "bundle")
    refused(sarsteer(*given), "free")
    assert listing(tmp_path) == {}


def test_a_build_takes_every_judge_and_refuses_one_that_cannot_judge(
    inputs: Inputs, bundle_path: Path, tmp_path: Path
) -> None:
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("# none\n", encoding="utf-8")
    out = ("-o", tmp_path / "bundle")
    refused(sarsteer(*inputs.build, *out, "--refusal-phrases", phrases), "holds no phrase")
    refused(sarsteer(*inputs.build, *out, "--judge-model", inputs.model), "--judge-refusal-label")
    gone = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model-name", "m", "--judge-attempts", "1")
    refused(sarsteer(*inputs.build, *out, *gone), "could not be reached", code=3)
    assert not (tmp_path / "bundle").exists()
    phrases.write_text("never\n", encoding="utf-8")
    result = sarsteer(
        *inputs.build, "-o", bundle_path, "--overwrite", "--dry-run", "--refusal-phrases", phrases
    )
    assert "verify     run" in answered(result)  # another judge, other verdicts
