"""The range guard at the command line: every verb refuses a float16 overflow that a plan tells of, unless told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from calibration.plan import Add, SteeringPlan
from sarsteer_export.bundle.manifest import PLAN
from tests.conftest import plan_of, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder
from tests.sarsteer_export.command_line import answered_json, listing, refused, sarsteer
from tests.sarsteer_export.conftest import Inputs

OVERFLOW = ("reaches 70000 unsteered", "the graph holds it in float16", "--allow-overflow")


def measured(plan: SteeringPlan, magnitude: float, path: Path) -> Path:
    """The plan, saved with another largest magnitude in its provenance; its digest is the same."""
    entry = {kind: [magnitude] * plan.num_layers for kind in ("unsteered", "steered")}
    told = dataclasses.replace(plan, provenance={**plan.provenance, "largest_magnitude": entry})
    assert told.digest() == plan.digest()
    told.save(path)
    return path


def test_an_overflow_is_refused_also_when_a_build_that_allowed_it_stands(
    inputs: Inputs, plan: SteeringPlan, tmp_path: Path
) -> None:
    """Nothing is reused past the guard: not the whole bundle, nor a plan of equal vectors and other measurements."""
    high, low = (measured(plan, size, tmp_path / f"{size:g}.safetensors") for size in (70000.0, 50.0))
    (tmp_path / "out").mkdir()
    bundle = tmp_path / "out" / "bundle"
    build = (*inputs.quick_build, "--dtype", "float16", "-o", bundle, "--plan")
    refused(sarsteer(*build, high), *OVERFLOW)
    assert listing(tmp_path / "out") == {}
    answered_json(sarsteer(*build, high, "--allow-overflow", "--json"))
    before = listing(tmp_path / "out")
    for more in ((), ("--dry-run",), ("--overwrite",), ("--overwrite", "--dry-run")):
        refused(sarsteer(*build, high, *more), *OVERFLOW)
    allowed = sarsteer(*build, high, "--allow-overflow", "--json")
    assert answered_json(allowed)["reused"] == ["calibrate", "export", "verify"]
    assert "warning: the residual stream reaches 70000" in allowed.stderr
    assert listing(tmp_path / "out") == before

    refused(sarsteer(*build, low), "exists", "--overwrite")
    again = answered_json(sarsteer(*build, low, "--overwrite", "--json"))
    assert again["reused"] == ["calibrate", "export"]
    assert SteeringPlan.load(bundle / PLAN) == SteeringPlan.load(low)
    refused(sarsteer(*build, high, "--overwrite", "--dry-run"), *OVERFLOW)
    refused(sarsteer(*build, high, "--overwrite"), *OVERFLOW)
    assert SteeringPlan.load(bundle / PLAN) == SteeringPlan.load(low)


def test_patch_and_refit_refuse_an_overflow_too(tmp_path: Path) -> None:
    hand_decoder(Variant(dtype=torch.float16), tmp_path / "decoder.onnx")
    plan = plan_of(Add(0, random_vector(HAND_WIDTH, seed=0)), width=HAND_WIDTH, layers=HAND_LAYERS)
    high, low = (measured(plan, size, tmp_path / f"{size:g}.safetensors") for size in (70000.0, 50.0))
    before = listing(tmp_path)
    steered, refitted = tmp_path / "steered.onnx", tmp_path / "refitted.onnx"
    patch = ("patch", tmp_path / "decoder.onnx", "-o", steered, "--plan")
    refused(sarsteer(*patch, high), *OVERFLOW)
    assert listing(tmp_path) == before
    allowed = sarsteer(*patch, high, "--allow-overflow", "--json")
    assert answered_json(allowed)["edits"]
    assert "warning: the residual stream reaches 70000" in allowed.stderr
    assert "warning" not in sarsteer(*patch, low, "--overwrite").stderr

    before = listing(tmp_path)
    for output in ((), ("-o", refitted)):
        refused(sarsteer("refit", steered, "--plan", high, *output), *OVERFLOW)
        assert listing(tmp_path) == before
    allowed = sarsteer("refit", steered, "--plan", high, "-o", refitted, "--allow-overflow")
    assert allowed.exit_code == 0, allowed.stderr
    assert "warning: the residual stream reaches 70000" in allowed.stderr
    assert "warning" not in sarsteer("refit", steered, "--plan", low).stderr
