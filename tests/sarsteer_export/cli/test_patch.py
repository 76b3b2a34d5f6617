"""`patch` and `unpatch` on the command line: what is told at run time, several plans, replacing, explaining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from engines.onnxruntime_runner import OnnxRuntimeRunner
from graph_passes.plan_names import PLAN_KEY, metadata
from tests.conftest import random_basis, random_vector
from tests.decoders import TinyDecoder
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, sarsteer
from tests.tiny_lalm import LAYERS, WIDTH


def add(layer: int, positions: Positions = Positions.LAST, seed: int = 0) -> Add:
    return Add(layer, random_vector(WIDTH, seed=seed), strength=0.5, positions=positions)


@pytest.fixture
def decoder(exported_decoder: TinyDecoder, tmp_path: Path) -> Path:
    """The tiny decoder, alone in a folder."""
    path = tmp_path / "graphs" / "decoder.onnx"
    path.parent.mkdir()
    for file in exported_decoder.path.parent.glob(f"{exported_decoder.path.name}*"):
        (path.parent / file.name).write_bytes(file.read_bytes())
    (path.parent / exported_decoder.path.name).rename(path)
    return path


def saved(path: Path, *edits: Edit) -> Path:
    SteeringPlan(WIDTH, LAYERS, edits).save(path)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return saved(tmp_path / "plan.safetensors", *(add(layer) for layer in range(LAYERS)))


def inputs_of(path: Path) -> dict[str, list[object]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {
        value.name: value.shape for value in (*session.get_inputs(), *session.get_overridable_initializers())
    }


def test_a_steered_decoder_is_told_what_was_asked_for(decoder: Path, tmp_path: Path) -> None:
    plan = saved(tmp_path / "p.safetensors", add(0), add(1, Positions.first(4)))
    given = ("patch", decoder, "--plan", plan, "--overwrite", "-o", decoder.with_name("steered.onnx"))
    asked = ("--last-from", "input", "--prompt-from", "input", "--strength-input", "edits")
    answered(sarsteer(*given, *asked))
    inputs = inputs_of(decoder.with_name("steered.onnx"))
    batch = inputs["inputs_embeds"][0]
    assert inputs["steering_positions"] == inputs["steering_prompt_lengths"] == [batch]
    assert inputs["steering_strength"] == [
        "steering_rows",
        2,
    ]  # one row where it is not fed, whatever the batch
    refused(sarsteer(*given), "'first:4'", "--prompt-from input", code=3)
    baked = saved(tmp_path / "p.safetensors", add(0))
    answered(
        sarsteer("patch", decoder, "--plan", baked, "--overwrite", "-o", decoder.with_name("steered.onnx"))
    )
    assert not any(name.startswith("steering_") for name in inputs_of(decoder.with_name("steered.onnx")))


def test_several_plans_meet_only_by_a_named_rule(decoder: Path, plan: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.safetensors", add(1, Positions.ALL, seed=1))
    output = decoder.with_name("steered.onnx")
    given = ("patch", decoder, "--plan", plan, "--plan", other, "-o", output)
    refused(sarsteer(*given), "plans 1 and 2 both edit block_output of block 1", "--combine sequence")
    assert not output.exists()
    found = answered_json(sarsteer(*given, "--combine", "sequence", "--json"))
    assert [(edit["layer"], edit["positions"]) for edit in found["edits"]] == [
        (0, "last"),
        (1, "last"),
        (2, "last"),
        (1, "all"),
    ]


def test_a_steered_decoder_is_steered_again_only_in_place_of_its_steering(
    decoder: Path, plan: Path, tmp_path: Path
) -> None:
    steered, again = decoder.with_name("steered.onnx"), decoder.with_name("again.onnx")
    answered(sarsteer("patch", decoder, "--plan", plan, "-o", steered))
    refused(sarsteer("patch", steered, "--plan", plan, "-o", again), "steered already", "--replace")
    assert not again.exists()
    other = saved(tmp_path / "other.safetensors", Project(0, random_basis(WIDTH, 3, seed=2)))
    answered(sarsteer("patch", steered, "--plan", other, "-o", again, "--replace"))
    fresh = decoder.with_name("fresh.onnx")
    answered(sarsteer("patch", decoder, "--plan", other, "-o", fresh))
    assert onnx.load(again, load_external_data=False) == onnx.load(fresh, load_external_data=False)
    assert metadata(onnx.load(again, load_external_data=False))[PLAN_KEY] == SteeringPlan.load(other).digest()
    answered(
        sarsteer("patch", decoder, "--plan", plan, "-o", fresh, "--replace", "--overwrite")
    )  # nothing to replace
    assert onnx.load(fresh, load_external_data=False) == onnx.load(steered, load_external_data=False)


def test_a_graph_that_only_says_that_it_is_steered_is_steered_in_place_of_what_it_says(
    decoder: Path, plan: Path
) -> None:
    graph = onnx.load(decoder, load_external_data=False)
    graph.metadata_props.add(key=PLAN_KEY, value="ab" * 32)
    claiming, output = decoder.with_name("claiming.onnx"), decoder.with_name("steered.onnx")
    onnx.save(graph, claiming)
    refused(sarsteer("patch", claiming, "--plan", plan, "-o", output), "says that it is steered", "--replace")
    answered(sarsteer("patch", claiming, "--plan", plan, "-o", output, "--replace"))
    named = metadata(onnx.load(output, load_external_data=False))
    assert named[PLAN_KEY] == SteeringPlan.load(plan).digest()


def test_the_plan_is_never_written_over(decoder: Path, plan: Path) -> None:
    before = plan.read_bytes()
    refused(sarsteer("patch", decoder, "--plan", plan, "-o", plan, "--overwrite"), str(plan))
    assert plan.read_bytes() == before


def test_unpatching_gives_back_the_decoder(decoder: Path, plan: Path, tmp_path: Path) -> None:
    steered, back = decoder.with_name("steered.onnx"), decoder.with_name("back.onnx")
    refused(sarsteer("unpatch", decoder, "-o", back), "holds no steering")
    answered(sarsteer("patch", decoder, "--plan", plan, "-o", steered))
    found = answered_json(sarsteer("unpatch", steered, "-o", back, "--json"))
    assert found == {"output": str(back)}
    assert back.read_bytes() == decoder.read_bytes()
    refused(sarsteer("unpatch", steered, "-o", back), "exists", "--overwrite")
    before = listing(tmp_path)
    elsewhere = tmp_path / "elsewhere" / "back.onnx"
    answered(sarsteer("unpatch", steered, "-o", elsewhere))
    assert elsewhere.read_bytes() == decoder.read_bytes()
    assert listing(tmp_path).keys() > before.keys()


def test_a_graph_altered_after_patching_is_not_unpatched_by_halves(decoder: Path, plan: Path) -> None:
    steered, back = decoder.with_name("steered.onnx"), decoder.with_name("back.onnx")
    answered(sarsteer("patch", decoder, "--plan", plan, "-o", steered))
    graph = onnx.load(steered, load_external_data=False)
    reader = next(node for node in graph.graph.node if node.op_type == "MatMul")
    reader.input[0] = "sarsteer.last.mask"
    onnx.save(graph, steered)
    refused(sarsteer("unpatch", steered, "-o", back), "altered after patching", "sarsteer.last.mask")
    assert not back.exists()


def test_explain_says_the_form_of_every_edit_why_and_what_it_costs(decoder: Path, tmp_path: Path) -> None:
    edits = (
        add(0),
        add(1, Positions.ALL),
        Project(2, random_basis(WIDTH, 4, seed=0), site=Site.BLOCK_OUTPUT, positions=Positions.LAST),
    )
    plan = saved(tmp_path / "plan.safetensors", *edits)
    output = decoder.with_name("steered.onnx")
    lines = answered(sarsteer("patch", decoder, "--plan", plan, "-o", output, "--explain")).splitlines()
    assert "one addition, selected by a mask: a bias would act at every position; decode 64 FLOP" in lines[0]
    assert "one addition: no bias is added to this tensor; decode 64 FLOP 768 B" in lines[1]
    assert "two thin products of the one gathered position: a row is edited at one position" in lines[2]
    assert lines[3].startswith("all edits, batch 1: decode ")
    assert lines[4].startswith("shared, once per graph: 13 nodes")
    assert lines[5] == f"3 edits, {LAYERS} blocks -> {output}"
    found = answered_json(sarsteer("patch", decoder, "--plan", plan, "-o", output, "--overwrite", "--json"))
    assert found["edits"][1]["cost"]["decode"] == {"flops": 64, "bytes": 768}
    assert found["edits"][1]["form"] == "one addition"


def test_a_fed_strength_reaches_a_runner_and_may_be_left_out(decoder: Path, plan: Path) -> None:
    steered = decoder.with_name("steered.onnx")
    answered(sarsteer("patch", decoder, "--plan", plan, "-o", steered, "--strength-input", "batch"))
    with OnnxRuntimeRunner(decoder) as plain, OnnxRuntimeRunner(steered) as runner:
        random = np.random.default_rng(0)
        feeds = {
            spec.name: np.zeros((2, int(spec.dims[1]), 0, int(spec.dims[3])), dtype=np.float32)
            for spec in runner.inputs
            if len(spec.dims) == 4
        }
        feeds["inputs_embeds"] = random.standard_normal((2, 3, WIDTH)).astype(np.float32)
        feeds["attention_mask"] = np.ones((2, 3), dtype=np.int64)
        feeds["position_ids"] = np.arange(3)[None].repeat(2, 0)
        unsteered, full = plain.run(feeds), runner.run(feeds)
        half = runner.run({**feeds, "steering_strength": np.array([0, 1], dtype=np.float32)})
    logits = next(iter(full))
    np.testing.assert_array_equal(half[logits][0], unsteered[logits][0])
    np.testing.assert_array_equal(half[logits][1], full[logits][1])
    assert np.abs(full[logits] - unsteered[logits]).max() > 0.1
