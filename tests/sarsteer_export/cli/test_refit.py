"""`sarsteer-export refit` on decoders of the tiny checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from calibration.plan import SteeringPlan
from sarsteer_export.bundle.manifest import PLAN, STEERED_DECODER
from tests import tiny_lalm
from tests.conftest import random_vector
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, sarsteer


@pytest.fixture
def new_plan(plan: SteeringPlan, tmp_path: Path) -> Path:
    """A file with a plan of the bundle's edits and other vectors."""
    edits = [
        dataclasses.replace(edit, vector=random_vector(tiny_lalm.WIDTH, seed=layer), strength=0.5)
        for layer, edit in enumerate(plan.edits)
    ]
    path = tmp_path / "new.safetensors"
    dataclasses.replace(plan, edits=tuple(edits)).save(path)
    return path


@pytest.fixture
def steered(decoder_copy: Path, bundle_path: Path) -> Path:
    """The tiny decoder steered by the bundle's plan, weights beside it."""
    path = decoder_copy.with_name("steered.onnx")
    answered(sarsteer("patch", decoder_copy, "--plan", bundle_path / PLAN, "-o", path))
    return path


def test_refit_in_place_gives_what_patch_gives(decoder_copy: Path, steered: Path, new_plan: Path) -> None:
    wanted = decoder_copy.with_name("wanted.onnx")
    answered(sarsteer("patch", decoder_copy, "--plan", new_plan, "-o", wanted))
    before = listing(steered.parent)
    assert before["steered.onnx"] != before["wanted.onnx"]
    found = answered_json(sarsteer("refit", steered, "--plan", new_plan, "--json"))
    after = listing(steered.parent)
    assert after == before | {"steered.onnx": before["wanted.onnx"]}
    stems = [f"sarsteer.{layer}.block_output.add.0" for layer in range(tiny_lalm.LAYERS)]
    assert found == {
        "output": str(steered),
        "plan_sha256": SteeringPlan.load(new_plan).digest(),
        "constants": [f"{stem}.{key}" for stem in stems for key in ("vector", "nothing")],
    }
    shown = answered_json(sarsteer("inspect", steered, "--json"))
    for layer, constant in enumerate(shown["steering"]):
        vector = random_vector(tiny_lalm.WIDTH, seed=layer)
        assert constant["norm"] == pytest.approx(0.5 * float(np.linalg.norm(vector)))


def test_refit_lists_every_constant(steered: Path, new_plan: Path) -> None:
    output = steered.with_name("refitted.onnx")
    *names, summary = answered(sarsteer("refit", steered, "--plan", new_plan, "-o", output)).splitlines()
    assert len(names) == 2 * tiny_lalm.LAYERS
    digest = SteeringPlan.load(new_plan).digest()[:12]
    assert summary == f"6 constants of plan {digest} replaced -> {output}"
    refused(sarsteer("refit", steered, "--plan", new_plan, "-o", output), "exists", "--overwrite")
    answered(sarsteer("refit", steered, "--plan", new_plan, "-o", output, "--overwrite"))


def test_a_bundles_decoder_is_refitted_outside_the_bundle_only(
    bundle_copy: Path, new_plan: Path, tmp_path: Path
) -> None:
    before = listing(bundle_copy)
    given = ("refit", bundle_copy / STEERED_DECODER, "--plan", new_plan)
    refused(sarsteer(*given), "belongs to the bundle", "hashes and parity verdict", "-o")
    refused(sarsteer(*given, "--overwrite"), "belongs to the bundle")
    for new in ("onnx/new.onnx", "deep/down/in/it/new.onnx"):
        refused(sarsteer(*given, "-o", bundle_copy / new), "lies inside the bundle", "-o")
    answered(sarsteer(*given, "-o", tmp_path / "out" / "steered.onnx"))
    assert listing(bundle_copy) == before
    assert set(listing(tmp_path / "out")) == {"steered.onnx", f"{STEERED_DECODER.name}_data"}


def test_a_plan_of_another_model_needs_force(steered: Path, plan: SteeringPlan, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    dataclasses.replace(plan, provenance={"model_fingerprint": "ab" * 32}).save(path)
    before = listing(steered.parent)
    refused(sarsteer("refit", steered, "--plan", path), "made for another model", "--force")
    assert listing(steered.parent) == before
    answered(sarsteer("refit", steered, "--plan", path, "--force"))


def test_wrong_input_is_one_error(decoder_copy: Path, steered: Path, new_plan: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    refused(sarsteer("refit", decoder_copy, "--plan", new_plan), "holds no steering", "patch")
    refused(sarsteer("refit", new_plan, "--plan", new_plan), "'.safetensors'", "expected a steered ONNX file")
    refused(sarsteer("refit", steered, "--plan", steered), "not a readable safetensors file")
    refused(sarsteer("refit", steered), "--plan")
    assert listing(tmp_path) == before
