"""Negative controls: plans that are wrong on purpose, and never right by accident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.lalm import Lalm
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from calibration.requests import read_requests
from engines.report import Verdict
from graph_passes.onnx_file import write_graph
from graph_passes.patch import patch_model
from sarsteer_export.around_decoder import AroundDecoder
from sarsteer_export.controls import random_control, wrong_plans
from sarsteer_export.parity_run import ParityRun, ParitySettings
from tests.conftest import plan_of, random_basis, random_vector
from tests.sarsteer_export.conftest import Inputs

WIDTH, LAYERS = 64, 3
RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.standard_normal((LAYERS, WIDTH)).astype(np.float32)
BASIS = np.linalg.qr(RANDOM.standard_normal((WIDTH, 2)))[0].astype(np.float32)


def plan(*edits: Edit) -> SteeringPlan:
    return SteeringPlan(WIDTH, LAYERS, edits)


DIFFERENT = plan(*(Add(layer, VECTORS[layer]) for layer in range(LAYERS)))
SAME_VECTOR = plan(*(Add(layer, VECTORS[0]) for layer in range(LAYERS)))
SAME_BASIS = plan(*(Project(layer, BASIS) for layer in range(LAYERS)))


def test_the_controls_of_a_plan_are_its_edits_with_one_thing_wrong() -> None:
    found = wrong_plans(DIFFERENT)
    assert list(found) == ["wrong sign", "wrong positions", "wrong layer"]
    assert [edit.strength for edit in found["wrong sign"].edits] == [-1.0] * LAYERS
    assert {edit.positions for edit in found["wrong positions"].edits} == {Positions.ALL}
    assert [edit.layer for edit in found["wrong layer"].edits] == [1, 2, 0]


@pytest.mark.parametrize("same", [SAME_VECTOR, SAME_BASIS])
def test_a_plan_that_is_the_same_in_every_block_is_never_its_own_control(same: SteeringPlan) -> None:
    found = wrong_plans(same)
    assert list(found) == ["wrong sign", "wrong positions", "every other edit missing"]
    assert [edit.layer for edit in found["every other edit missing"].edits] == [0, 2]


def test_a_shift_that_gives_the_same_edits_is_passed_over() -> None:
    periodic = SteeringPlan(WIDTH, 4, tuple(Add(layer, VECTORS[layer % 2]) for layer in range(4)))
    assert [edit.layer for edit in wrong_plans(periodic)["wrong layer"].edits] == [1, 2, 3, 0]
    shifted_by_two = SteeringPlan(WIDTH, 4, (Add(0, VECTORS[0]), Add(2, VECTORS[0])))
    assert [edit.layer for edit in wrong_plans(shifted_by_two)["wrong layer"].edits] == [1, 3]


def test_positions_that_swap_into_each_other_are_no_control() -> None:
    both = plan(Add(1, VECTORS[0]), Add(1, VECTORS[0], positions=Positions.ALL))
    assert "wrong positions" not in wrong_plans(both)


def test_the_only_edit_behind_the_final_norm_cannot_move() -> None:
    single = plan(Add(LAYERS - 1, VECTORS[0], site=Site.FINAL_NORM_OUTPUT))
    assert list(wrong_plans(single)) == ["wrong sign", "wrong positions"]


@pytest.mark.parametrize("same", [SAME_VECTOR, SAME_BASIS], ids=["add", "project"])
def test_such_a_plan_passes_parity_with_every_control_caught(
    same: SteeringPlan, lalm: Lalm, inputs: Inputs, decoder_folder: Path, tmp_path: Path
) -> None:
    requests = read_requests(inputs.harmful)[:2]
    run = ParityRun(lalm, same, requests, ParitySettings(prompts=2, decode_steps=2))
    exported = run.check_export(decoder_folder / "decoder.onnx")
    steered = decoder_folder / f"steered_{tmp_path.name}.onnx"
    write_graph(patch_model(exported.unsteered, same).model, steered)
    try:
        report = run.check_steering(exported, steered, AroundDecoder((), ()))
    finally:
        steered.unlink()
    assert report.verdict is Verdict.PASSED, report.failures()
    names = {control.name for case in report.cases for control in case.controls}
    assert names == {
        "unsteered",
        "wrong sign",
        "wrong positions",
        "every other edit missing",
        "last column instead of last attended",
    }


def test_every_row_is_padded_even_in_a_batch_of_one(lalm: Lalm, inputs: Inputs, decoder_folder: Path) -> None:
    requests = read_requests(inputs.harmful)[:1]
    run = ParityRun(lalm, DIFFERENT, requests, ParitySettings(prompts=1, decode_steps=1))
    left, right = (case.script for case in run.check_export(decoder_folder / "decoder.onnx").cases)
    assert left.steps[0]["attention_mask"][0, :3].tolist() == [0, 0, 0]
    assert right.steps[0]["attention_mask"][0, -3:].tolist() == [0, 0, 0]
    for script in (left, right):
        assert script.steps[0]["attention_mask"].sum() == script.steps[0]["attention_mask"].shape[1] - 3


def test_random_controls_have_the_norms_of_the_plan_and_other_directions() -> None:
    edits = (Add(0, random_vector(16, seed=1, scale=3.0), 0.7), Add(2, random_vector(16, seed=2)))
    plan = plan_of(*edits, width=16)
    one, two, other = (random_control(plan, seed) for seed in (0, 0, 1))
    assert one == two != other
    for edit, control in zip(plan.edits, one.edits, strict=True):
        assert (control.layer, control.site, control.positions, control.strength) == (
            edit.layer,
            edit.site,
            edit.positions,
            edit.strength,
        )
        wanted, found = edit.tensors()["vector"], control.tensors()["vector"]
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=1e-6)  # float32
        assert abs(wanted @ found) < 0.9 * np.linalg.norm(wanted) ** 2
    first, second = (
        edit.tensors()["vector"] / np.linalg.norm(edit.tensors()["vector"]) for edit in one.edits
    )
    assert abs(first @ second) < 0.9


def test_random_controls_of_projections_keep_rank_and_mean() -> None:
    mean = random_vector(16, seed=3)
    plan = plan_of(Project(1, random_basis(16, 4, seed=1), mean, 0.5), width=16)
    (control,) = random_control(plan, 0).edits
    assert isinstance(control, Project)
    assert control.basis.shape == (16, 4)
    np.testing.assert_allclose(control.basis.T @ control.basis, np.eye(4), atol=1e-6)  # float32
    np.testing.assert_array_equal(control.mean, mean)
    assert np.linalg.norm(control.basis.T @ plan.edits[0].tensors()["basis"]) < 1.9  # 2 were the same space


def test_a_vector_of_zeros_stays_one() -> None:
    plan = plan_of(Add(0, np.zeros(16, dtype=np.float32)), width=16)
    assert not random_control(plan, 0).edits[0].tensors()["vector"].any()
