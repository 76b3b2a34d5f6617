"""`verify`: a bundle is what it says, or the verdict is failed, however well its hashes fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from calibration.errors import InputError, ParityError
from calibration.lalm import Lalm
from calibration.plan import Positions, SteeringPlan
from calibration.requests import read_requests
from engines.report import ParityReport, Verdict
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import patch_model
from graph_passes.selection import LastFrom, SteeringInputs
from sarsteer_export import ParitySettings, verify
from sarsteer_export.bundle.manifest import (
    AUDIO_ENCODER,
    MANIFEST,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    Manifest,
    describe_files,
)
from sarsteer_export.controls import wrong_plans
from sarsteer_export.exporting.export import ExportedComponents
from sarsteer_export.parity_run import parity_requests
from tests.sarsteer_export.command_line import answered_json, one_error, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs

QUICK = ParitySettings(prompts=2, decode_steps=2)
QUICK_OPTIONS = ("--prompts", "2", "--decode-steps", "2")


def adjust_hashes(bundle: Path) -> None:
    """Make the manifest agree with the files again, as a forger would."""
    content = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    content["files"] = describe_files(bundle)
    (bundle / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    Manifest.read(bundle).check_hashes(bundle)


def failures(report: ParityReport) -> str:
    assert report.verdict is Verdict.FAILED
    return "\n".join(report.failures())


def test_a_sound_bundle_passes_on_requests_it_was_not_built_on(
    bundle_path: Path, inputs: Inputs, tmp_path: Path
) -> None:
    report = tmp_path / "new" / "report.json"
    given = ("verify", bundle_path, "--model", inputs.model, "--requests", inputs.benign)
    found = answered_json(sarsteer(*given, *QUICK_OPTIONS, "--report", report, "--json"))
    assert found["verdict"] == "passed"
    assert found["failures"] == []
    assert json.loads(report.read_text(encoding="utf-8")) == found
    assert found["context"]["settings"]["prompts"] == 2
    assert found["notes"] == [
        f"greedy rollouts, {system}: 2 of 2 word for word the same" for system in ("unsteered", "steered")
    ]
    assert all(len(case["logits_difference"]) == 3 for case in found["cases"])


def test_the_report_as_a_page_and_without_blocks(bundle_path: Path, inputs: Inputs, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    given = ("verify", bundle_path, "--model", inputs.model, "--requests", inputs.benign, "--no-blocks")
    result = sarsteer(*given, *QUICK_OPTIONS, "--report", report)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("verdict: passed\n")
    assert "block cosine" not in result.stdout
    page = report.read_text(encoding="utf-8")
    assert "passed" in page
    assert "</html>" in page
    refused(sarsteer(*given, "--report", report), "exists", "--overwrite")
    refused(sarsteer(*given, "--report", tmp_path / "report.pdf"), ".json or .html")


def test_an_altered_file_is_refused_by_name(bundle_copy: Path, inputs: Inputs) -> None:
    content = bytearray((bundle_copy / AUDIO_ENCODER).read_bytes())
    content[100] ^= 1
    (bundle_copy / AUDIO_ENCODER).write_bytes(bytes(content))
    given = ("verify", bundle_copy, "--model", inputs.model, "--requests", inputs.harmful)
    refused(sarsteer(*given), AUDIO_ENCODER.as_posix(), "sha256", "altered")


def test_another_checkpoint_is_refused(bundle_path: Path, inputs: Inputs, other_checkpoint: Path) -> None:
    given = ("verify", bundle_path, "--model", other_checkpoint, "--requests", inputs.harmful)
    refused(sarsteer(*given), "another checkpoint", "fingerprint")


def test_an_unsteered_engine_with_fitting_hashes_fails_with_exit_code_6(
    bundle_copy: Path, inputs: Inputs, tmp_path: Path
) -> None:
    shutil.copyfile(bundle_copy / UNSTEERED_DECODER, bundle_copy / STEERED_DECODER)
    adjust_hashes(bundle_copy)
    report = tmp_path / "report.json"
    given = ("verify", bundle_copy, "--model", inputs.model, "--requests", inputs.harmful, *QUICK_OPTIONS)
    result = sarsteer(*given, "--json", "--report", report)
    assert result.exit_code == 6
    found = json.loads(result.stdout)
    assert found["verdict"] == "failed"
    assert json.loads(report.read_text(encoding="utf-8")) == found, "a failed report is written too"
    assert any("effect cosine is 0" in failure for failure in found["failures"])
    assert "greedy rollouts, unsteered: 2 of 2 word for word the same" in found["notes"]
    assert "greedy rollouts, steered: 2 of 2 word for word the same" not in found["notes"]
    errors = result.stderr[result.stderr.index("Error: ") :].splitlines()
    assert errors[0] == "Error: parity failed:"
    assert [line.strip() for line in errors[1:]] == found["failures"]


def a_hundredth_weaker(plan: SteeringPlan) -> SteeringPlan:
    edits = tuple(dataclasses.replace(edit, strength=edit.strength * 0.99) for edit in plan.edits)
    return dataclasses.replace(plan, edits=edits)


def one_edit_missing(plan: SteeringPlan) -> SteeringPlan:
    return dataclasses.replace(plan, edits=plan.edits[:-1])


def last_edit_everywhere(plan: SteeringPlan) -> SteeringPlan:
    *first, last = plan.edits
    return dataclasses.replace(plan, edits=(*first, dataclasses.replace(last, positions=Positions.ALL)))


@pytest.mark.parametrize(
    "wrong",
    [
        "wrong sign",
        "wrong layer",
        "wrong positions",
        a_hundredth_weaker,
        one_edit_missing,
        last_edit_everywhere,
    ],
)
def test_a_decoder_patched_with_a_wrong_plan_fails(
    wrong: object, bundle_copy: Path, lalm: Lalm, inputs: Inputs, plan: SteeringPlan
) -> None:
    other = wrong_plans(plan)[wrong] if isinstance(wrong, str) else wrong(plan)  # type: ignore[operator]
    graph = read_graph(bundle_copy / UNSTEERED_DECODER)
    write_graph(patch_model(graph, other).model, bundle_copy / STEERED_DECODER)
    adjust_hashes(bundle_copy)
    text = failures(verify(bundle_copy, lalm, inputs.harmful, QUICK))
    assert "effect" in text
    assert "baseline" not in text, "the unsteered decoder is right"


def test_a_decoder_that_steers_the_last_column_instead_of_the_last_attended_position_fails(
    bundle_copy: Path, lalm: Lalm, inputs: Inputs, plan: SteeringPlan
) -> None:
    graph = read_graph(bundle_copy / UNSTEERED_DECODER)
    wrong = patch_model(graph, plan, inputs=SteeringInputs(last_from=LastFrom.SEQUENCE)).model
    write_graph(wrong, bundle_copy / STEERED_DECODER)
    adjust_hashes(bundle_copy)
    one = dataclasses.replace(QUICK, prompts=1)  # one row: its padding is made, not found
    text = failures(verify(bundle_copy, lalm, inputs.harmful, one))
    assert "right padding, effect" in text
    assert "left padding, effect" not in text


def test_another_plan_file_than_the_one_in_the_decoder_fails(
    bundle_copy: Path, lalm: Lalm, inputs: Inputs, plan: SteeringPlan
) -> None:
    wrong_plans(plan)["wrong sign"].save(bundle_copy / PLAN)
    adjust_hashes(bundle_copy)
    assert "effect" in failures(verify(bundle_copy, lalm, inputs.harmful, QUICK))


def test_a_wrong_audio_encoder_fails(bundle_copy: Path, lalm: Lalm, inputs: Inputs) -> None:
    data = bundle_copy / f"{AUDIO_ENCODER.as_posix()}_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2 + 3] ^= 0x08  # the exponent of one weight
    data.write_bytes(bytes(content))
    adjust_hashes(bundle_copy)
    text = failures(verify(bundle_copy, lalm, inputs.harmful, QUICK))
    assert text.startswith("before the decoder: prompt embeddings max abs, relative is ")
    assert "\n" not in text


def test_a_wrong_unsteered_decoder_is_no_ground_to_stand_on(
    bundle_copy: Path, lalm: Lalm, inputs: Inputs
) -> None:
    shutil.copyfile(bundle_copy / STEERED_DECODER, bundle_copy / UNSTEERED_DECODER)
    adjust_hashes(bundle_copy)
    with pytest.raises(ParityError, match="the unsteered export does not agree with the eager model"):
        verify(bundle_copy, lalm, inputs.harmful, QUICK)


def test_without_the_unsteered_decoder_the_model_is_exported_again(
    bundle_copy: Path, decoder_folder: Path, lalm: Lalm, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Path] = []

    def export_again(_lalm: Lalm, output: Path) -> ExportedComponents:
        exported.append(output)
        decoder = decoder_folder / "decoder.onnx"
        return ExportedComponents(decoder, decoder, decoder)

    monkeypatch.setattr("sarsteer_export.verification.export", export_again)
    (bundle_copy / UNSTEERED_DECODER).unlink()
    adjust_hashes(bundle_copy)
    assert verify(bundle_copy, lalm, inputs.harmful, QUICK).verdict is Verdict.PASSED
    assert len(exported) == 1
    assert not exported[0].parent.exists(), "the scratch folder was left behind"


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"decode_steps": 0}])
def test_settings_that_prove_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected at least 1"):
        ParitySettings(**settings)


def test_parity_requests_take_turns_and_never_repeat(inputs: Inputs) -> None:
    harmful, benign = read_requests(inputs.harmful), read_requests(inputs.benign)
    assert parity_requests(harmful, benign, count=3) == (harmful[0], benign[0], harmful[1])
    everything = parity_requests(harmful, benign, count=99)
    assert len(everything) == len(set(everything)) == 11
    assert parity_requests(harmful, count=2) == harmful[:2]


def test_the_error_of_a_bad_model_is_one_message(bundle_path: Path, inputs: Inputs, tmp_path: Path) -> None:
    given = ("verify", bundle_path, "--model", tmp_path / "absent", "--requests", inputs.harmful)
    result = sarsteer(*given)
    assert result.exit_code == 2
    one_error(result.stderr, "absent", "no such directory")
