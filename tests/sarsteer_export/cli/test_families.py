"""Models of other families through the command line: one that also talks, and one that cannot be driven."""

from __future__ import annotations

import json
from pathlib import Path

from calibration.not_supported import NOT_SUPPORTED
from calibration.plan import SteeringPlan
from tests.sarsteer_export.command_line import answered, refused, sarsteer
from tests.zoo import omni


def test_calibrate_takes_a_model_that_also_talks(
    harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    model = omni.save_whole_qwen2_5(tmp_path / "model")
    data = ("--harmful", harmful_requests, "--benign", benign_requests)
    answered(sarsteer("calibrate", model, *data, "-o", tmp_path / "plan.safetensors"))
    plan = SteeringPlan.load(tmp_path / "plan.safetensors")
    assert (plan.hidden_size, plan.num_layers) == (omni.WIDTH, 2)
    assert plan.provenance["model"] == "Qwen2_5OmniThinkerForConditionalGeneration"


def test_a_family_that_cannot_be_driven_ends_with_the_reason(
    harmful_requests: Path, benign_requests: Path, tmp_path: Path
) -> None:
    model = omni.save_qwen2_5(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": NOT_SUPPORTED[0].model_types[0]}))
    data = ("--harmful", harmful_requests, "--benign", benign_requests)
    result = sarsteer("calibrate", model, *data, "-o", tmp_path / "plan.safetensors")
    assert NOT_SUPPORTED[0].reason in refused(result, str(model), code=3)
    assert not (tmp_path / "plan.safetensors").exists()
