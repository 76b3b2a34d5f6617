"""The table of the residual stream: what reads each site, and the edits in the order in which they act."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.plan import Positions, Site
from graph_passes.patch import patch_model
from graph_passes.residual_stream import Block, ResidualStream, find_residual_stream
from graph_passes.stream_table import SiteRow, StreamTable, stream_table
from tests import tiny_lalm
from tests.conftest import one_edit, plan_of, random_vector
from tests.decoders import TinyDecoder

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
    assert [name for node in found.nodes for name in node.shared] == ["sarsteer.last.mask"]
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


def test_a_steered_file_reads_the_same_after_a_round_trip(
    exported_decoder: TinyDecoder, tmp_path: Path
) -> None:
    plan = plan_of(edit("add", Site.BLOCK_OUTPUT, Positions.LAST, 1))
    model = patch_model(exported_decoder.proto, plan).model
    onnx.save(model, tmp_path / "steered.onnx")
    assert table_of(onnx.load(tmp_path / "steered.onnx", load_external_data=False)) == table_of(model)
