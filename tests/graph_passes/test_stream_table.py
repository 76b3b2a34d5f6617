"""The table of the residual stream: what reads each site, and the edits in the order in which they act."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.plan import Positions, Site, SteeringPlan
from graph_passes.forms import Form
from graph_passes.patch import patch_model
from graph_passes.residual_stream import Block, ResidualStream, find_residual_stream
from graph_passes.selection import PromptFrom, SteeringInputs, StrengthInput
from graph_passes.stream_table import SiteRow, StreamTable, makers, shared_tensors, stream_table
from tests import tiny_lalm
from tests.conftest import one_edit, plan_of, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.foreign.cases import FOREIGN

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS


def edit(op: str, site: Site, positions: Positions, layer: int):
    return one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=layer)


def table_of(model: onnx.ModelProto) -> StreamTable:
    return stream_table(model, find_residual_stream(model))


def row(table: StreamTable, layer: int, site: Site) -> SiteRow:
    (found,) = [row for row in table.rows if (row.layer, row.site) == (layer, site.value)]
    return found


def test_every_block_has_its_sites_and_the_last_one_the_final_norm(any_decoder: TinyDecoder) -> None:
    stream, table = find_residual_stream(any_decoder.proto), table_of(any_decoder.proto)
    expected = [
        (layer, site) for layer in range(LAYERS) for site in (Site.BLOCK_INPUT, Site.BLOCK_OUTPUT)
    ] + [(LAYERS - 1, Site.FINAL_NORM_OUTPUT)]
    assert [(row.layer, row.site) for row in table.rows] == [(layer, site.value) for layer, site in expected]
    assert [row.tensor for row in table.rows] == [stream.tensor(site, layer) for layer, site in expected]
    assert {row.dtype for row in table.rows} == {"float32"}
    assert not any(row.edits for row in table.rows)
    assert table.shared == ()


def test_readers_and_makers_are_the_files_own_nodes(any_decoder: TinyDecoder) -> None:
    nodes = {(node.op_type, node.name): node for node in any_decoder.proto.graph.node}
    table = table_of(any_decoder.proto)
    for site in table.rows:
        named = [*site.consumers, *([site.producer] if site.producer else [])]
        assert named
        assert {(node.op, node.name) for node in named} <= set(nodes)
    assert [node.op for node in table.rows[-1].consumers] == ["MatMul"]


def test_a_block_of_a_standard_graph_is_read_by_its_norm_and_the_next_residual_add(
    exported_decoder: TinyDecoder,
) -> None:
    index = {output: node for node in exported_decoder.proto.graph.node for output in node.output}
    site = row(table_of(exported_decoder.proto), 0, Site.BLOCK_OUTPUT)
    assert [node.op for node in site.consumers] == ["Pow", "Mul", "Add"]
    assert site.producer is not None
    assert site.producer.name == index[site.tensor].name


def test_edits_of_one_tensor_are_told_apart_by_site_and_listed_in_the_order_in_which_they_act(
    any_decoder: TinyDecoder,
) -> None:
    plan = plan_of(
        edit("project", Site.BLOCK_INPUT, Positions.ALL, 2),
        edit("project", Site.BLOCK_OUTPUT, Positions.LAST, 1),
        edit("add", Site.BLOCK_OUTPUT, Positions.LAST, 1),
        edit("add", Site.BLOCK_INPUT, Positions.LAST, 0),
        edit("add", Site.FINAL_NORM_OUTPUT, Positions.LAST, 2),
    )
    patched = patch_model(any_decoder.proto, plan)
    table = table_of(patched.model)
    assert [
        (row.layer, row.site, [(edit.op, edit.positions) for edit in row.edits])
        for row in table.rows
        if row.edits
    ] == [
        (0, "block_input", [("add", "last")]),
        (1, "block_output", [("project", "last"), ("add", "last")]),
        (2, "block_input", [("project", "all")]),
        (2, "final_norm_output", [("add", "last")]),
    ]
    listed = [node.name for row in table.rows for edit in row.edits for node in edit.nodes]
    assert sorted(listed) == sorted(name for edit in patched.edits for name in edit.nodes)
    steered = find_residual_stream(patched.model).tensor(Site.BLOCK_INPUT, 0)
    assert row(table, 0, Site.BLOCK_INPUT).tensor == steered
    assert any("attention_mask" in node.inputs for node in table.shared)


def test_what_an_edit_is_made_of(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(edit("project", Site.BLOCK_OUTPUT, Positions.LAST, 1))
    (found,) = row(table_of(patch_model(exported_decoder.proto, plan).model), 1, Site.BLOCK_OUTPUT).edits
    assert found.inserted
    constants = {constant.key: constant for constant in found.constants}
    assert constants["basis"].shape == (WIDTH, 4)
    assert constants["basis"].norm == pytest.approx(2.0, rel=1e-6)  # four orthonormal columns in float32
    assert found.nodes[0].reads_stream
    shared = [name for node in found.nodes for name in node.shared]
    assert shared == ["sarsteer.last.row", "sarsteer.last.mask"]  # one position is gathered, and edited
    assert found.nodes[0].op == "GatherND"
    for before, node in zip(found.nodes, found.nodes[1:], strict=False):
        assert before.name in node.own


def test_an_edit_that_is_a_constant_of_the_decoders_own_node_is_found() -> None:
    """A norm that adds a bias of ours to the stream it normalises."""
    name = "sarsteer.0.block_output.add.0.vector"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["branch"], "product"),
        helper.make_node("Add", ["x", "branch"], ["sum"], "residual"),
        helper.make_node("Add", ["sum", name], ["y"], "biased"),
        helper.make_node("MatMul", ["y", "w"], ["logits"], "head"),
    ]
    weights = [
        numpy_helper.from_array(random_vector(4, seed=0), name),
        helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 4]) for name in ("x", "logits")
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], weights))
    stream = ResidualStream((Block(0, "x", "y", ()),), None, 4, TensorProto.FLOAT, None)
    (found,) = row(stream_table(model, stream), 0, Site.BLOCK_OUTPUT).edits
    assert not found.inserted
    assert [(node.op, node.name) for node in found.nodes] == [("Add", "biased")]
    assert row(stream_table(model, stream), 0, Site.BLOCK_INPUT).edits == ()


KINDS = [
    Positions.parse(text)
    for text in ("last", "all", "prompt", "generated", "first:2", "range:1:3", "range:2:")
]


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A small decoder whose projections have biases. Tests leave it as they find it."""
    return hand_decoder(Variant(), tmp_path_factory.mktemp("hand") / "model.onnx")[1]


@pytest.mark.parametrize("strength", [None, *StrengthInput])
@pytest.mark.parametrize("op", ["add", "project"])
@pytest.mark.parametrize("positions", KINDS, ids=lambda positions: positions.value)
def test_every_kind_of_positions_and_of_strength_is_read_back(
    hand: onnx.ModelProto, op: str, positions: Positions, strength: StrengthInput | None
) -> None:
    edit = one_edit(op, Site.BLOCK_INPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
    other = one_edit("add", Site.BLOCK_INPUT, Positions.LAST, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
    patched = patch_model(
        hand,
        SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit, other)),
        inputs=SteeringInputs(prompt_from=PromptFrom.INPUT, strength=strength),
    )
    table = table_of(patched.model)
    found, last = row(table, 1, Site.BLOCK_INPUT).edits
    assert (found.op, found.positions, found.inserted) == (op, positions.value, True)
    assert (last.op, last.positions) == ("add", "last")
    assert tuple(node.name for node in found.nodes) == patched.edits[0].nodes
    for before, node in zip(found.nodes, found.nodes[1:], strict=False):
        assert before.name in node.own

    fed = {
        name: {source for node in makers(table.shared, name) for source in node.inputs}
        for name in shared_tensors([found])
    }
    expected = set() if positions == Positions.ALL else {"attention_mask"}
    expected |= {"steering_prompt_lengths"} if positions.needs_prompt_length else set()
    expected |= {"steering_strength"} if strength else set()
    assert set().union(*fed.values()) - {"inputs_embeds"} == expected
    gathers = op == "project" and positions == Positions.LAST
    assert ("sarsteer.last.row" in fed) == gathers == any(node.op == "GatherND" for node in found.nodes)
    listed = {node.name for node in table.shared}
    assert all(node.name in listed for name in fed for node in makers(table.shared, name))


def test_an_edit_in_the_bias_of_a_projection_is_found_by_its_site(hand: onnx.ModelProto) -> None:
    edits = [
        one_edit("add", site, Positions.ALL, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer)
        for layer, site in ((1, Site.BLOCK_INPUT), (1, Site.BLOCK_OUTPUT))
    ]
    patched = patch_model(hand, SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits))
    assert [edit.form for edit in patched.edits] == [Form.PROJECTION_BIAS] * 2
    table = table_of(patched.model)
    assert [(row.layer, row.site) for row in table.rows if row.edits] == [
        (1, "block_input"),
        (1, "block_output"),
    ]
    for layer, asked, made in zip((0, 1), edits, patched.edits, strict=True):
        (found,) = row(table, 1, asked.site).edits
        assert (found.op, found.positions, found.inserted) == ("add", "all", False)
        assert [(node.op, node.name) for node in found.nodes] == [
            ("Add", made.nodes[0]),
            ("Add", f"/blocks.{layer}/down/Add"),
        ]
        (vector,) = found.constants
        assert vector.norm == pytest.approx(asked.strength * float(np.linalg.norm(asked.vector)), rel=1e-6)
    for node in patched.model.graph.node:  # an edit whose bias nothing reads any more acts nowhere
        if node.name == "/blocks.1/down/Add":
            node.input[:] = [
                "blocks.1.down.bias" if name.startswith("sarsteer.") else name for name in node.input
            ]
    assert row(table_of(patched.model), 1, Site.BLOCK_OUTPUT).edits == ()


def test_an_edit_in_the_bias_of_a_fused_norm_is_found_by_its_site() -> None:
    model = onnx.load(FOREIGN / "genai_fp32" / "model.onnx")
    stream = find_residual_stream(model)
    edit = one_edit("add", Site.BLOCK_OUTPUT, Positions.ALL, width=stream.hidden_size, layers=3, layer=1)
    patched = patch_model(model, SteeringPlan(stream.hidden_size, 3, [edit]))
    assert patched.edits[0].form is Form.NORM_BIAS
    (found,) = row(table_of(patched.model), 1, Site.BLOCK_OUTPUT).edits
    (node,) = found.nodes
    assert (found.inserted, node.op) == (False, "SkipSimplifiedLayerNormalization")
    assert node.name in {node.name for node in model.graph.node}
    assert [constant.name for constant in found.constants] == list(patched.edits[0].constants)


def test_a_steered_file_reads_the_same_after_a_round_trip(
    exported_decoder: TinyDecoder, tmp_path: Path
) -> None:
    plan = plan_of(edit("add", Site.BLOCK_OUTPUT, Positions.LAST, 1))
    model = patch_model(exported_decoder.proto, plan).model
    onnx.save(model, tmp_path / "steered.onnx")
    assert table_of(onnx.load(tmp_path / "steered.onnx", load_external_data=False)) == table_of(model)
