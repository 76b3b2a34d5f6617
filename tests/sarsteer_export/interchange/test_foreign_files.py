"""Files that the tools themselves wrote are read as they mean them: the steered tiny decoder does what it did there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.plan import Add, Positions, Site, SteeringPlan
from calibration.steered import steered
from sarsteer_export.interchange.convert import ConversionSettings, convert
from tests.foreign.checkpoints import CHECKPOINTS
from tests.sarsteer_export.interchange.written import FILES, LAYERS, PLACES, WIDTH, plan_behind, write

STRENGTH = 0.75
EAGER_ATOL = 1e-5
"""Largest difference of logits between releases of transformers and torch on this decoder, whose logits reach 3:
float32 sums in another order. 1e-6 on the machine where the files were made."""
HALF_CACHE_ATOL = 5e-3
"""llama.cpp keeps keys and values in float16: unsteered it is 1.8e-3 away from transformers."""
FROM_PACKAGES = ("repeng", "repeng_block_0", "steering_vectors", "behavior")
FILE = {"repeng": "repeng.gguf", "repeng_block_0": "repeng_block_0.gguf", "behavior": "behavior.svec"}
SEED = {"repeng": 1, "repeng_block_0": 2, "steering_vectors": 3, "behavior": 4}
"""Of the vectors, as `make/packages.py` has them."""


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "llama", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FILES / "expected.safetensors")


@pytest.fixture(scope="module")
def llama_cpp() -> dict[str, torch.Tensor]:
    return load_file(FILES / "llama_cpp.safetensors")


def read(name: str, folder: Path, **said: object) -> SteeringPlan:
    path = FILES / FILE.get(name, f"{name}.pt")
    wanted = ConversionSettings(num_layers=LAYERS, **{"strength": STRENGTH, **said})  # type: ignore[arg-type]
    return convert(path, folder / "plan.safetensors", wanted).plan


def logits(decoder: PreTrainedModel, plan: SteeringPlan, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), steered(decoder, plan):
        return torch.as_tensor(decoder(input_ids=prompt, use_cache=False).logits)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", FROM_PACKAGES)
def test_a_file_is_read_to_the_bit(name: str, tmp_path: Path) -> None:
    plan = read(name, tmp_path)
    rng = np.random.default_rng(SEED[name])
    layers = range(1, LAYERS) if name == "repeng" else range(LAYERS)
    site = Site.BLOCK_INPUT if name == "behavior" else Site.BLOCK_OUTPUT
    assert plan.edits == tuple(
        Add(layer, rng.standard_normal(WIDTH).astype(np.float32), STRENGTH, site, Positions.ALL)
        for layer in layers
    )
    assert SteeringPlan.load(tmp_path / "plan.safetensors") == plan


@pytest.mark.parametrize("name", FROM_PACKAGES)
def test_the_plan_does_what_the_package_did(
    name: str, decoder: PreTrainedModel, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plan = read(name, tmp_path)
    assert difference(logits(decoder, plan, expected["prompt"]), expected[name]) < EAGER_ATOL
    assert difference(expected["unsteered"], expected[name]) > 0.1


def test_the_plan_does_what_llama_cpp_did(
    decoder: PreTrainedModel,
    expected: dict[str, torch.Tensor],
    llama_cpp: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    assert difference(llama_cpp["unsteered"], expected["unsteered"]) < HALF_CACHE_ATOL
    found = logits(decoder, read("repeng", tmp_path), expected["prompt"])
    assert difference(found, llama_cpp["repeng"]) < HALF_CACHE_ATOL
    assert difference(llama_cpp["unsteered"], llama_cpp["repeng"]) > 20 * HALF_CACHE_ATOL


def test_the_layer_and_the_site_are_seen_in_the_logits(
    decoder: PreTrainedModel, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plan = read("behavior", tmp_path)
    moved = [
        Add(edit.layer, edit.vector, edit.strength, Site.BLOCK_OUTPUT, Positions.ALL) for edit in plan.edits
    ]
    wrong = SteeringPlan(WIDTH, LAYERS, tuple(moved))
    assert difference(logits(decoder, wrong, expected["prompt"]), expected["behavior"]) > 0.1


def test_vectors_may_be_read_to_act_at_other_positions(
    decoder: PreTrainedModel, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plan = read("steering_vectors", tmp_path, positions="last")
    found = logits(decoder, plan, expected["prompt"])
    assert difference(found, expected["steering_vectors_last"]) < EAGER_ATOL
    assert difference(expected["steering_vectors"], expected["steering_vectors_last"]) > 0.1


def test_bfloat16_vectors_are_read_exactly(tmp_path: Path) -> None:
    plan = read("steering_vectors_bf16", tmp_path)
    rng = np.random.default_rng(3)
    for edit in plan.edits:
        vector = torch.from_numpy(rng.standard_normal(WIDTH).astype(np.float32)).bfloat16().float().numpy()
        np.testing.assert_array_equal(edit.tensors()["vector"], vector, strict=True)


@pytest.mark.parametrize("name", PLACES)
def test_a_written_file_is_what_the_tools_were_given(name: str, tmp_path: Path) -> None:
    """The committed files were read by the packages themselves; ours of today are the same."""
    written = write(name, tmp_path)
    if name == "written.pt":  # torch.save writes the names and versions of today into its archive
        plans = [
            convert(
                path, tmp_path / f"{number}.safetensors", ConversionSettings(num_layers=LAYERS)
            ).plan.edits
            for number, path in enumerate((written, FILES / name))
        ]
        assert plans[0] == plans[1]
    else:
        assert written.read_bytes() == (FILES / name).read_bytes()


@pytest.mark.parametrize("name", PLACES)
def test_a_package_does_what_the_plan_does(
    name: str, decoder: PreTrainedModel, expected: dict[str, torch.Tensor]
) -> None:
    found = logits(decoder, plan_behind(name), expected["prompt"])
    assert difference(found, expected[name]) < EAGER_ATOL
    assert difference(expected["unsteered"], expected[name]) > 0.1


def test_llama_cpp_does_what_the_plan_does(
    decoder: PreTrainedModel, expected: dict[str, torch.Tensor], llama_cpp: dict[str, torch.Tensor]
) -> None:
    found = logits(decoder, plan_behind("written.gguf"), expected["prompt"])
    assert difference(found, llama_cpp["written"]) < HALF_CACHE_ATOL
    assert difference(llama_cpp["unsteered"], llama_cpp["written"]) > 20 * HALF_CACHE_ATOL
