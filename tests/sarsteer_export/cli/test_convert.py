"""`convert` through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.plan import Add, Positions, SteeringPlan
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, run_python, sarsteer
from tests.sarsteer_export.interchange.test_activations import checkpoint
from tests.sarsteer_export.interchange.written import FILES

WIDTH, LAYERS = 4, 3


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """As `calibrate` makes them: every block, at the last position."""
    edits = tuple(Add(layer, np.full(WIDTH, layer + 1, np.float32), 0.5) for layer in range(LAYERS))
    SteeringPlan(WIDTH, LAYERS, edits).save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def test_a_control_vector_becomes_a_plan_that_says_where_it_came_from(tmp_path: Path) -> None:
    output = tmp_path / "plan.safetensors"
    told = answered_json(
        sarsteer(
            "convert", FILES / "repeng.gguf", "-o", output, "--num-layers", "3", "--strength", "0.5", "--json"
        )
    )
    plan = SteeringPlan.load(output)
    assert [(edit.layer, edit.strength, edit.positions) for edit in plan.edits] == [
        (1, 0.5, Positions.ALL),
        (2, 0.5, Positions.ALL),
    ]
    assert plan.provenance["source"] == {
        "file": "repeng.gguf",
        "format": "llama.cpp control vector",
        "model_hint": "llama",
        "sha256": listing(FILES)["repeng.gguf"],
    }
    assert told["provenance"] == plan.provenance
    assert (told["format"], told["plan_sha256"], told["notes"]) == ("plan", plan.digest(), [])
    shown = answered(sarsteer("inspect", output))
    assert "block_output" in shown
    assert "repeng.gguf" in shown


def test_a_plan_of_last_positions_and_every_block_needs_two_permissions_to_become_gguf(
    plan: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vector.gguf"
    before = listing(tmp_path)
    refused(
        sarsteer("convert", plan, "-o", output),
        "3 edits of the plan act at last",
        "--allow-all-positions",
        code=3,
    )
    refused(
        sarsteer("convert", plan, "-o", output, "--allow-all-positions"), "block 0", "--drop-block-0", code=3
    )
    assert listing(tmp_path) == before
    result = sarsteer("convert", plan, "-o", output, "--allow-all-positions", "--drop-block-0")
    assert "3 edits read" in answered(result)
    assert "warning: add at block_output of block 0 dropped" in result.stderr
    assert "what was written is another steering, far stronger" in result.stderr
    back = tmp_path / "back.safetensors"
    answered(sarsteer("convert", output, "-o", back, "--num-layers", "3", "--positions", "last"))
    assert [(edit.layer, edit.tensors()["vector"][0]) for edit in SteeringPlan.load(back).edits] == [
        (1, 1.0),
        (2, 1.5),
    ]


def test_layers_can_be_chosen_instead_of_dropped(plan: Path, tmp_path: Path) -> None:
    output = tmp_path / "vector.gguf"
    answered(sarsteer("convert", plan, "-o", output, "--layers", "1,-1", "--allow-all-positions"))
    refused(sarsteer("convert", FILES / "repeng.gguf", "-o", plan.with_name("p.safetensors"), "--num-layers", "3",
                     "--layers", "0"), "nothing in the file steers block 0")  # fmt: skip


def test_an_svec_file_says_what_the_library_is_told_elsewhere(plan: Path, tmp_path: Path) -> None:
    result = sarsteer(
        "convert", FILES / "behavior.svec", "-o", tmp_path / "a.safetensors", "--num-layers", "3"
    )
    answered(result)
    assert "its default is layers 10 to 15" in result.stderr
    arguments = ("convert", plan, "-o", tmp_path / "a.svec", "--allow-all-positions")
    refused(sarsteer(*arguments), "add at block_output of block 2", "--drop-last-block", code=3)
    result = sarsteer(*arguments, "--drop-last-block")
    answered(result)
    assert "add at block_output of block 0, add at block_output of block 1: written as what" in result.stderr
    refused(sarsteer("convert", plan, "-o", tmp_path / "a.json", "--to", "svec"), "*.svec alone")


def test_activations_become_a_plan_and_need_no_number_of_layers(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "activations.pth")
    arguments = ("convert", tmp_path / "activations.pth", "-o", tmp_path / "plan.safetensors")
    answered(sarsteer(*arguments, "--alpha", "0.2", "--lambda", "0.5", "--rank", "3"))
    plan = SteeringPlan.load(tmp_path / "plan.safetensors")
    assert {edit.strength for edit in plan.edits} == {0.2}
    assert (plan.provenance["lambda"], plan.provenance["rank"]) == (0.5, 3)
    refused(
        sarsteer(*arguments, "--overwrite", "--num-layers", "7"),
        "is for 3 decoder blocks; --num-layers says 7",
    )
    refused(
        sarsteer(*arguments, "--overwrite", "--strength", "2"), "--strength says nothing about a checkpoint"
    )


@pytest.mark.parametrize(
    ("source", "output", "options", "words"),
    [
        ("repeng.gguf", "p.safetensors", (), ("does not say how many decoder blocks", "--num-layers")),
        ("repeng.gguf", "p.safetensors", ("--num-layers", "2"), ("a vector for layer 2", "2 blocks")),
        (
            "repeng.gguf",
            "p.safetensors",
            ("--num-layers", "3", "--positions", "some"),
            ("--positions is 'some'",),
        ),
        ("repeng.gguf", "p.safetensors", ("--num-layers", "3", "--alpha", "1"), ("--alpha says nothing",)),
        (
            "repeng.gguf",
            "p.safetensors",
            ("--num-layers", "3", "--drop-block-0"),
            ("a plan holds every block",),
        ),
        (
            "repeng.gguf",
            "p.safetensors",
            ("--num-layers", "3", "--model-type", "qwen2"),
            ("--model-type is 'qwen2'", "format plan has no place"),
        ),
        ("repeng.gguf", "p.pt", ("--num-layers", "3", "--model-type", "qwen2"), ("format steering-vectors",)),
        ("repeng.gguf", "p.svec", ("--num-layers", "3", "--drop-block-0"), ("--drop-block-0 drops none",)),
        (
            "behavior.svec",
            "p.gguf",
            ("--num-layers", "3", "--drop-last-block"),
            ("--drop-last-block drops none",),
        ),
        (
            "behavior.svec",
            "p.pt",
            ("--num-layers", "3", "--drop-last-block"),
            ("the edits of the last block",),
        ),
        ("repeng.gguf", "p.bin", ("--num-layers", "3"), ("the suffix says no format", "--to")),
        ("none.gguf", "p.safetensors", ("--num-layers", "3"), ("none.gguf: no such file",)),
        ("../written.py", "p.safetensors", ("--num-layers", "3"), ("it is of no known format",)),
    ],
)
def test_what_is_refused(
    source: str, output: str, options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(sarsteer("convert", FILES / source, "-o", tmp_path / output, *options), *words)
    assert not listing(tmp_path)


def test_a_plan_is_no_conversion_of_a_plan_and_nothing_is_replaced_unasked(
    plan: Path, tmp_path: Path
) -> None:
    refused(sarsteer("convert", plan, "-o", tmp_path / "b.safetensors"), "is a plan already")
    (tmp_path / "a.gguf").write_text("mine")
    refused(sarsteer("convert", plan, "-o", tmp_path / "a.gguf"), "--overwrite")
    refused(
        sarsteer("convert", plan, "-o", tmp_path / "c.pt", "--strength", "2"),
        "--strength says nothing about a plan",
    )


def test_inspect_shows_files_of_other_tools(tmp_path: Path) -> None:
    shown = answered(sarsteer("inspect", FILES / "behavior.svec"))
    assert "added at every position at the block_input of:" in shown
    assert "block   0  |vector|" in shown
    assert "model_type: llama" in shown
    torch.save(checkpoint(), tmp_path / "activations.pth")
    told = answered_json(sarsteer("inspect", tmp_path / "activations.pth", "--json"))
    assert told["shapes"] == {"harmful": [6, 3, 8], "refused": [6, 3, 8], "benign": [9, 3, 8]}
    told = answered_json(sarsteer("inspect", FILES / "steering_vectors.pt", "--json"))
    assert (told["kind"], list(told["norms"])) == ("vectors", ["0", "1", "2"])


def test_vectors_are_converted_without_pytorch(tmp_path: Path) -> None:
    code = """
import sys
from sarsteer_export import ConversionSettings, convert
convert(sys.argv[1], sys.argv[2] + "/a.safetensors", ConversionSettings(num_layers=4))
convert(sys.argv[2] + "/a.safetensors", sys.argv[2] + "/a.svec")
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
"""
    result = run_python(code, FILES / "repeng.gguf", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.svec").is_file()
