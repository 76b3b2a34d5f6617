"""`inspect` of decoders: the table, sites files and `patch --sites`, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

from calibration.plan import Positions, Site, SteeringPlan
from calibration.statistics import StateStatistics
from graph_passes.onnx_file import read_graph
from graph_passes.residual_stream import find_residual_stream
from graph_passes.stream_table import NodeName, SiteRow, StreamTable
from sarsteer_export.bundle.manifest import PLAN, STEERED_DECODER
from sarsteer_export.inspection.stream_text import table_lines
from tests import tiny_lalm
from tests.conftest import one_edit
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder, no_past, run_graph, session
from tests.disguised import disguise_residual_adds
from tests.merged import merge_with_itself
from tests.sarsteer_export.command_line import answered, answered_json, listing, refused, sarsteer
from tests.sarsteer_export.test_block_picture import parsed

LAYERS = tiny_lalm.LAYERS


@pytest.fixture
def disguised(decoder_copy: Path) -> Path:
    """The decoder with residual adds that are not found, beside the decoder and its weights."""
    path = decoder_copy.with_name("disguised.onnx")
    onnx.save(disguise_residual_adds(onnx.load(decoder_copy, load_external_data=False)), path)
    return path


def test_the_table_has_a_line_per_block_and_one_per_edit(bundle_path: Path, plan: SteeringPlan) -> None:
    text = answered(sarsteer("inspect", bundle_path / STEERED_DECODER))
    stream = find_residual_stream(read_graph(bundle_path / STEERED_DECODER))
    lines = text[text.index("residual stream: ") :].splitlines()
    assert lines[0] == f"residual stream: {LAYERS} blocks of width {tiny_lalm.WIDTH}, float32"
    assert [line.split()[:3] for line in lines if " read by " in line] == [
        ["block", "0", "input"],
        *(["block", str(layer), "output"] for layer in range(LAYERS)),
        ["final", "norm", stream.final_norm_output],
    ]
    steered = [line for line in lines if " steered: " in line]
    norms = [2.0 * float(np.linalg.norm(edit.tensors()["vector"])) for edit in plan.edits]
    for line, norm in zip(steered, norms, strict=True):
        assert f"add last  vector {tiny_lalm.WIDTH} norm {norm:.4g}, nothing 0  by Where, Add" in line or (
            f"add last  vector {tiny_lalm.WIDTH} norm {norm:.4g}  by Where, Add" in line
        )


def test_json_has_all_of_it_in_full(bundle_path: Path) -> None:
    found = answered_json(sarsteer("inspect", bundle_path / STEERED_DECODER, "--json"))
    rows = {(row["layer"], row["site"]): row for row in found["sites"]}
    assert len(rows) == 2 * LAYERS + 1
    row = rows[1, "block_output"]
    assert row["tensor"] == found["stream"]["blocks"][1]["output"]
    assert row["dtype"] == "float32"
    assert [node["op"] for node in row["consumers"]] == ["Pow", "Mul", "Add"]
    (edit,) = row["edits"]
    assert edit["name"] == "sarsteer.1.block_output.add.0"
    assert [node["op"] for node in edit["nodes"]] == ["Where", "Add"]
    assert [entry["inputs"] for entry in found["shared"] if entry["inputs"] == ["attention_mask"]]


def test_the_table_of_many_blocks_stays_readable() -> None:
    nodes = tuple(
        NodeName("SkipSimplifiedLayerNormalization", "/model/layers.17/" + "x" * 60) for _ in range(6)
    )
    rows = [
        SiteRow(layer, site, f"/model/layers.{layer + number - 1}/" + "y" * 60, "float16", None, nodes, ())
        for layer in range(32)
        for number, site in enumerate(("block_input", "block_output"))
    ]
    lines = table_lines(StreamTable(4096, "float16", tuple(rows), ()))
    assert len(lines) == 1 + 33  # the heading, the input of block 0, every output
    assert all(f"block {layer:3} output" in lines[layer + 2] for layer in range(32))
    assert all(line.endswith("2 more") for line in lines[1:])


def test_sites_are_written_and_steer_as_the_found_ones_do(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path
) -> None:
    sites, output = tmp_path / "sites.json", decoder_copy.with_name("steered.onnx")
    found = answered_json(sarsteer("inspect", decoder_copy, "--sites", sites, "--json"))
    assert found["sites_file"] == str(sites)
    content = json.loads(sites.read_text(encoding="utf-8"))
    assert content["hidden_size"] == tiny_lalm.WIDTH
    assert [block["output"] for block in content["blocks"]] == [
        block["output"] for block in found["stream"]["blocks"]
    ]
    answered(sarsteer("patch", decoder_copy, "--plan", bundle_path / PLAN, "--sites", sites, "-o", output))
    assert output.read_bytes() == (bundle_path / STEERED_DECODER).read_bytes()
    refused(sarsteer("inspect", decoder_copy, "--sites", sites), str(sites), "exists", "--overwrite")
    answered(sarsteer("inspect", decoder_copy, "--sites", sites, "--overwrite"))


def test_a_decoder_that_is_not_understood_is_steered_by_hand(
    disguised: Path, bundle_path: Path, tmp_path: Path
) -> None:
    plan, sites, output = bundle_path / PLAN, tmp_path / "sites.json", disguised.with_name("by_hand.onnx")
    before = listing(disguised.parent)
    refused(sarsteer("patch", disguised, "--plan", plan, "-o", output), code=4)
    text = answered(sarsteer("inspect", disguised, "--sites", sites))
    assert f"sites -> {sites}, to be completed by hand from {2 * LAYERS} candidates" in text
    given = ("patch", disguised, "--plan", plan, "--sites", sites, "-o", output)
    refused(sarsteer(*given), str(sites), "blocks.0.input is null", "complete it from the candidates")
    assert listing(disguised.parent) == before

    content = json.loads(sites.read_text(encoding="utf-8"))
    outputs = [candidate["tensor"] for candidate in content["candidates"]][1::2]
    inputs = ["inputs_embeds", *outputs[:-1]]
    content["blocks"] = [{"input": start, "output": end} for start, end in zip(inputs, outputs, strict=True)]
    sites.write_text(json.dumps(content), encoding="utf-8")
    answered(sarsteer(*given))
    assert_same_steering(output, bundle_path / STEERED_DECODER, unsteered=disguised)


def assert_same_steering(by_hand: Path, found: Path, *, unsteered: Path) -> None:
    """Prefill and a decode step give the same to the bit, since the same numbers are added in the same order."""
    generator = torch.Generator().manual_seed(0)
    past = no_past(2)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    for sequence in (4, 1):
        embeds = torch.randn(2, sequence, tiny_lalm.WIDTH, generator=generator)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -sequence:]
        results = [
            run_graph(session(path), embeds, mask, positions, past) for path in (by_hand, found, unsteered)
        ]
        for name, values in results[0].items():
            np.testing.assert_array_equal(values, results[1][name], strict=True)
        assert np.abs(results[0]["logits"] - results[2]["logits"]).max() > 0.1  # steering of norm 2 is seen
        past = [torch.from_numpy(results[0][name]) for name in results[0] if name != "logits"]
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 65}, "hidden_size says 65"),
        ({"final_norm_output": "nowhere"}, "final_norm_output is 'nowhere'"),
        ({"version": 7}, "version is 7"),
    ],
)
def test_sites_of_another_graph_are_refused(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    sites, output = tmp_path / "sites.json", decoder_copy.with_name("steered.onnx")
    answered(sarsteer("inspect", decoder_copy, "--sites", sites))
    sites.write_text(
        json.dumps({**json.loads(sites.read_text(encoding="utf-8")), **change}), encoding="utf-8"
    )
    given = ("patch", decoder_copy, "--plan", bundle_path / PLAN, "--sites", sites, "-o", output)
    refused(sarsteer(*given), f"sites file {sites}", words)
    assert not output.exists()


def test_a_block_is_drawn(bundle_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "block.svg"
    given = ("inspect", bundle_path / STEERED_DECODER, "--svg", picture)
    assert answered(sarsteer(*given)).endswith(f"block 0 -> {picture}\n")
    content = picture.read_text(encoding="utf-8")
    assert parsed(content).tag.endswith("svg")
    assert "sarsteer.0.block_output.add.0" in content
    refused(sarsteer(*given), "exists", "--overwrite")
    found = answered_json(sarsteer(*given, "--overwrite", "--block", "2", "--json"))
    assert found["picture"] == {"file": str(picture), "block": 2}
    assert "sarsteer.2.block_output.add.0" in picture.read_text(encoding="utf-8")


def test_what_cannot_be_drawn_is_refused(bundle_path: Path, disguised: Path, tmp_path: Path) -> None:
    picture = tmp_path / "block.svg"
    refused(sarsteer("inspect", bundle_path / PLAN, "--svg", picture), "--svg need an ONNX decoder")
    refused(
        sarsteer("inspect", bundle_path / PLAN, "--sites", picture), "--sites and --svg need an ONNX decoder"
    )
    refused(sarsteer("inspect", bundle_path / STEERED_DECODER, "--block", "1"), "--block", "--svg")
    far = ("inspect", bundle_path / STEERED_DECODER, "--svg", picture, "--block", "3")
    refused(sarsteer(*far), "--block is 3; the decoder has blocks 0 to 2")
    refused(sarsteer("inspect", disguised, "--svg", picture), code=4)
    assert not picture.exists()


def test_what_is_read_is_never_written_over(decoder_copy: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    data = next(file for file in decoder_copy.parent.iterdir() if file != decoder_copy)
    for option in ("--svg", "--sites"):
        given = ("inspect", decoder_copy, "--overwrite", option)
        refused(sarsteer(*given, decoder_copy), str(decoder_copy), "is read, or written twice")
        refused(sarsteer(*given, data), str(data), "external data")
    both = ("--svg", tmp_path / "one", "--sites", tmp_path / "one")
    refused(sarsteer("inspect", decoder_copy, *both), "written twice")
    assert listing(tmp_path) == before


def test_patch_never_writes_over_what_it_is_given(
    decoder_copy: Path, bundle_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    sites, plan = folder / "sites.json", folder / "plan.safetensors"
    plan.write_bytes((bundle_path / PLAN).read_bytes())
    answered(sarsteer("inspect", decoder_copy, "--sites", sites))
    data = next(file for file in decoder_copy.parent.iterdir() if file != decoder_copy)
    named_as_data = folder / data.name  # where data is copied to when the output goes to another folder
    named_as_data.write_bytes(plan.read_bytes())
    link = folder / "link.safetensors"
    link.symlink_to(plan)
    before = listing(tmp_path)
    given = ("patch", decoder_copy, "--sites", sites, "--overwrite", "-o")
    for output, steering, words in (
        (sites, plan, sites),
        (plan, plan, plan),
        (folder / ".." / folder.name / plan.name, plan, plan),
        (folder / "steered.onnx", named_as_data, named_as_data),
        (link, link, link),
        (plan, link, link),
    ):
        refused(
            sarsteer(*given, output, "--plan", steering), str(words), "is read, and would be written over"
        )
    assert listing(tmp_path) == before
    answered(sarsteer(*given, decoder_copy.with_name("steered.onnx"), "--plan", plan))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merged decoder of two bodies, its weights in the file."""
    _, model = hand_decoder(Variant(), tmp_path / "model.onnx")
    onnx.save(merge_with_itself(model), tmp_path / "merged.onnx")
    return tmp_path / "merged.onnx"


def test_both_bodies_of_a_merged_decoder_are_shown(merged: Path, tmp_path: Path) -> None:
    steered, plan = merged.with_name("steered.onnx"), tmp_path / "plan.safetensors"
    kinds = ((Site.BLOCK_OUTPUT, Positions.ALL, 0), (Site.BLOCK_OUTPUT, Positions.LAST, 1))
    edits = [
        one_edit("add", site, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer)
        for site, positions, layer in kinds
    ]
    SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits).save(plan)
    answered(sarsteer("patch", merged, "--plan", plan, "-o", steered))
    text = answered(sarsteer("inspect", steered))
    for body in ("then_branch", "else_branch"):
        assert text.count(f"residual stream of {body}: {HAND_LAYERS} blocks of width {HAND_WIDTH}") == 1
    assert text.count("steered: add all") == text.count("steered: add last") == 2
    found = answered_json(sarsteer("inspect", steered, "--json", "--svg", tmp_path / "block.svg"))
    assert set(found["bodies"]) == {"then_branch", "else_branch"}
    for body in found["bodies"].values():
        assert [(row["layer"], row["site"]) for row in body["sites"] if row["edits"]] == [
            (layer, site.value) for site, _, layer in kinds
        ]
    assert found["sites"] == next(iter(found["bodies"].values()))["sites"]
    assert "sarsteer.0.block_output.add.0" in (tmp_path / "block.svg").read_text(encoding="utf-8")


def test_sites_of_a_merged_decoder_are_not_said_by_hand(
    merged: Path, bundle_path: Path, tmp_path: Path
) -> None:
    sites = tmp_path / "sites.json"
    words = ("merged decoder of 2 bodies", "then_branch", "export the decoder unmerged")
    refused(sarsteer("inspect", merged, "--sites", sites), *words, code=3)
    assert not sites.exists()
    answered(sarsteer("inspect", merged.with_name("model.onnx"), "--sites", sites))
    output = tmp_path / "steered.onnx"
    given = ("patch", merged, "--plan", bundle_path / PLAN, "--sites", sites, "-o", output)
    refused(sarsteer(*given), *words, code=3)
    assert not output.exists()


def test_nothing_is_written_when_a_part_cannot_be(disguised: Path, tmp_path: Path) -> None:
    given = ("inspect", disguised, "--svg", tmp_path / "block.svg", "--sites", tmp_path / "sites.json")
    before = listing(tmp_path)
    refused(sarsteer(*given), code=4)
    assert listing(tmp_path) == before


def test_what_a_file_says_of_itself_moves_no_cursor(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "decoder.onnx")
    proto.metadata_props.add(key="author", value="\x1b[31mred\rover")
    onnx.save(proto, tmp_path / "decoder.onnx")
    shown = answered(sarsteer("inspect", tmp_path / "decoder.onnx"))
    assert "author: \\x1b[31mred\\rover" in shown
    assert "\x1b" not in shown


def test_statistics_that_a_sweep_keeps_are_shown(tmp_path: Path) -> None:
    states_NLD = np.random.default_rng(0).standard_normal((5, 3, 4))
    found = StateStatistics.of_pairs(states_NLD[:2], states_NLD[1:3]).merged(
        StateStatistics.of_benign(states_NLD)
    )
    path = tmp_path / "statistics.safetensors"
    found.save(path, {"largest_magnitude": [1.0]})
    assert answered_json(sarsteer("inspect", path, "--json")) == {
        "kind": "statistics",
        "pairs": 2,
        "benign": 5,
        "num_layers": 3,
        "hidden_size": 4,
        "provenance": {"largest_magnitude": [1.0]},
    }
    assert "statistics of 3 blocks of width 4, which `sweep` reads" in answered(sarsteer("inspect", path))
    save_file({"x": np.zeros(2)}, path)
    refused(sarsteer("inspect", path), "is not a steering plan")
