"""Every edit takes the cheapest form that is exact for it, and what a form costs is what its nodes do."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto

from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from graph_passes.forms import Cost, Form, cost
from graph_passes.fused_norms import is_fused
from graph_passes.lowering import StreamType, lower
from graph_passes.patch import patch_model
from graph_passes.selection import Selection, SteeringInputs, StrengthInput
from graph_passes.unpatch import unpatch_model
from tests import tiny_lalm
from tests.conftest import one_edit, plan_of, random_basis, random_vector
from tests.decoders import (
    HAND_LAYERS,
    HAND_WIDTH,
    TinyDecoder,
    Variant,
    hand_decoder,
    hand_feeds,
    no_past,
    run_graph,
    session,
)
from tests.reference import literally_steered

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
OUTPUT_ATOL = 2e-5
"""float32 sums in another order than PyTorch's: measured at most 3e-6 on logits of magnitude up to 7."""


def hand_plan(*edits: Edit) -> SteeringPlan:
    return SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)


def everywhere(layer: int, **changes: object) -> Add:
    edit = one_edit(
        "add", Site.BLOCK_OUTPUT, Positions.ALL, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer
    )
    assert isinstance(edit, Add)
    return dataclasses.replace(edit, **changes)  # type: ignore[arg-type]


def forms(proto: object, plan: SteeringPlan, inputs: SteeringInputs | None = None) -> list[Form]:
    return [edit.form for edit in patch_model(proto, plan, inputs=inputs or SteeringInputs()).edits]  # type: ignore[arg-type]


def test_each_kind_of_edit_has_its_form(tmp_path: Path) -> None:
    """The hand decoder's last projection has a bias; the add of block 1 shares its tensor with another edit."""
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    add, last = everywhere(0), everywhere(1, positions=Positions.LAST)
    shared = everywhere(2), everywhere(2, strength=0.1)
    projections = [
        one_edit("project", Site.FINAL_NORM_OUTPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=2)
        for positions in (Positions.ALL, Positions.LAST, Positions.range(1))
    ]
    assert forms(proto, hand_plan(add, last, *shared, *projections)) == [
        Form.PROJECTION_BIAS,
        Form.SELECTED_ADD,
        Form.ADD,
        Form.ADD,
        Form.PROJECTION,
        Form.GATHERED_PROJECTION,
        Form.SELECTED_PROJECTION,
    ]
    fed = SteeringInputs(strength=StrengthInput.BATCH)
    assert forms(proto, hand_plan(add, projections[0]), fed) == [Form.SELECTED_ADD, Form.SELECTED_PROJECTION]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_no_bias_form(dtype: torch.dtype, tmp_path: Path) -> None:
    """A bias would be rounded before the sum, the eager model's vector after it."""
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    assert forms(proto, hand_plan(everywhere(0))) == [Form.ADD]


def test_a_projection_without_bias_gets_an_addition(exported_decoder: TinyDecoder) -> None:
    edit = one_edit("add", Site.BLOCK_OUTPUT, Positions.ALL, width=WIDTH, layers=LAYERS, layer=0)
    assert forms(exported_decoder.proto, plan_of(edit)) == [Form.ADD]


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_sum"])
def test_the_bias_of_the_last_projection_carries_an_edit_at_all_positions(
    residual: str, tmp_path: Path
) -> None:
    """No node but an addition of two constants is inserted, and nothing of the file's own is rewritten but one name."""
    model, proto = hand_decoder(Variant(residual=residual), tmp_path / "model.onnx")
    plan = hand_plan(*(everywhere(layer) for layer in range(HAND_LAYERS)))
    result = patch_model(proto, plan)
    assert {edit.form for edit in result.edits} == {Form.PROJECTION_BIAS}
    assert len(result.model.graph.node) == len(proto.graph.node) + len(plan.edits)
    sample = model.sample(seed=5)
    with torch.inference_mode():
        plain = model(*sample)
        with literally_steered(model.blocks, model.norm, plan, sample[1]):
            expected = model(*sample)
    got = session(result.model).run(None, hand_feeds(proto, sample))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=OUTPUT_ATOL)
    assert (expected[0] - plain[0]).abs().max() > 1000 * OUTPUT_ATOL
    zero = patch_model(proto, hand_plan(everywhere(0, strength=0.0)))
    assert zero.edits[0].form is Form.PROJECTION_BIAS
    feeds = hand_feeds(proto, sample)
    for one, other in zip(session(zero.model).run(None, feeds), session(proto).run(None, feeds), strict=True):
        assert one.tobytes() == other.tobytes()
    assert unpatch_model(result.model) == proto


def test_the_unused_bias_of_a_fused_norm_is_bit_equal_to_the_addition_it_saves(
    fused_decoder: TinyDecoder,
) -> None:
    """The kernel adds it to the sum of both summands, as an `Add` behind them would."""
    edits = [
        one_edit("add", Site.BLOCK_OUTPUT, Positions.ALL, width=WIDTH, layers=LAYERS, layer=layer)
        for layer in range(LAYERS)
    ]
    result = patch_model(fused_decoder.proto, plan_of(*edits))
    assert {edit.form for edit in result.edits} == {Form.NORM_BIAS}
    fused = [sum(map(is_fused, graph.node)) for graph in (result.model.graph, fused_decoder.proto.graph)]
    assert fused[0] == fused[1]
    nothing = [dataclasses.replace(edit, strength=0.0) for edit in edits]  # two edits on a tensor: additions
    split = patch_model(fused_decoder.proto, plan_of(*edits, *nothing))
    assert {edit.form for edit in split.edits} == {Form.ADD}
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.long)
    feeds = (torch.randn(2, 5, WIDTH, generator=generator), mask, mask.cumsum(1) - 1, no_past(2))
    parent = fused_decoder.path.parent
    one, other = (run_graph(session(graph.model, parent), *feeds) for graph in (result, split))
    for name, expected in other.items():
        assert one[name].tobytes() == expected.tobytes()
    assert unpatch_model(result.model) == fused_decoder.proto


SEQUENCE, NARROW = 3, 8
ADD = Add(0, random_vector(NARROW, seed=0))
PROJECT = Project(0, random_basis(NARROW, 2, seed=0), random_vector(NARROW, seed=1))
BARE = Project(0, random_basis(NARROW, 2, seed=0))
MASK, ROW = gs.Variable("mask", dtype=np.bool_), gs.Variable("row", dtype=np.int64)
FACTOR = gs.Variable("factor", dtype=np.float32)
LOWERED = [
    (ADD, Form.ADD, Selection()),
    (ADD, Form.SELECTED_ADD, Selection(MASK)),
    (PROJECT, Form.PROJECTION, Selection()),
    (BARE, Form.PROJECTION, Selection()),
    (PROJECT, Form.SELECTED_PROJECTION, Selection(MASK)),
    (PROJECT, Form.GATHERED_PROJECTION, Selection(MASK, ROW)),
    (ADD, Form.SELECTED_ADD, Selection(MASK, None, FACTOR)),
    (PROJECT, Form.SELECTED_PROJECTION, Selection(MASK, None, FACTOR)),
    (PROJECT, Form.GATHERED_PROJECTION, Selection(MASK, ROW, FACTOR)),
]


@pytest.mark.parametrize(("edit", "form", "selection"), LOWERED, ids=[form.name for _, form, _ in LOWERED])
def test_costs_are_what_the_nodes_read_write_and_compute(
    edit: Edit, form: Form, selection: Selection
) -> None:
    """Counted anew from the inferred shapes of the very nodes that insertion writes."""
    hidden = gs.Variable("hidden", dtype=np.float32, shape=(1, SEQUENCE, NARROW))
    lowered = lower(edit, "edit", hidden, StreamType(TensorProto.FLOAT), selection)
    MASK.shape, ROW.shape, FACTOR.shape = (1, SEQUENCE, 1), (1, 1, 1), (1, 1, 1)
    graph = gs.Graph(lowered.nodes, inputs=[hidden, MASK, ROW, FACTOR], outputs=[lowered.output], opset=17)
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph, do_type_check=False), data_prop=True)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    width = {"mask": 1, "row": 8}
    flops = bytes_moved = 0
    for node in model.graph.node:
        bytes_moved += sum(
            math.prod(shapes[name]) * width.get(name, 4) for name in (*node.input, *node.output)
        )
        if node.op_type in ("Add", "Sub", "Mul"):
            flops += math.prod(shapes[node.output[0]])
        elif node.op_type == "MatMul":
            flops += 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    sizes = {"hidden_size": NARROW, "elem_bytes": 4, "sequence": SEQUENCE}
    assert cost(edit, form, **sizes, baked=selection.factor is None) == Cost(flops, bytes_moved)


def test_biases_cost_next_to_nothing() -> None:
    sizes = {"hidden_size": NARROW, "elem_bytes": 4, "sequence": SEQUENCE}
    assert cost(ADD, Form.PROJECTION_BIAS, **sizes) == Cost(0, 0)
    assert cost(ADD, Form.NORM_BIAS, **sizes) == Cost(SEQUENCE * NARROW, NARROW * 4)


def test_a_projection_never_costs_the_square_of_the_width() -> None:
    wide = Project(0, np.eye(512, 4, dtype=np.float32))
    assert cost(wide, Form.PROJECTION, hidden_size=512, elem_bytes=4, sequence=1).flops < 512 * 512 / 10
