"""In which type norms square the stream: fused and written out, with and without a cast, steered or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibration.plan import Add, Positions, Site, SteeringPlan
from graph_passes.norm_precision import (
    NormPrecision,
    largest_finite,
    narrowest_type,
    norm_precisions,
    type_name,
)
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from tests.conftest import one_edit, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder

FLOAT, HALF, BFLOAT, DOUBLE = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
)
SEQUENTIAL = [0, 0, 1, 1, 2, 2, 2]
"""Blocks of the norms of three blocks with two norms each, and the final norm's."""
PARALLEL = [0, 1, 2, 2]
"""The same with one square for attention and MLP together; exporters merge the squares of two such norms."""

# The TorchScript exporter widens a LayerNorm that it writes out from float16 to double.
VARIANTS = {
    "RMS with a cast": (Variant(dtype=torch.float16), 17, FLOAT, SEQUENTIAL),
    "Gemma norm": (Variant(dtype=torch.float16, norm="rms_gemma"), 17, FLOAT, SEQUENTIAL),
    "RMS, bfloat16": (Variant(dtype=torch.bfloat16), 17, FLOAT, SEQUENTIAL),
    "LayerNormalization": (Variant(dtype=torch.float16, norm="layer"), 17, FLOAT, SEQUENTIAL),
    "LayerNorm written out": (Variant(dtype=torch.float16, norm="layer"), 16, DOUBLE, SEQUENTIAL),
    "written out, float32": (Variant(norm="layer"), 16, FLOAT, SEQUENTIAL),
    "parallel": (Variant(dtype=torch.float16, residual="parallel"), 17, FLOAT, PARALLEL),
    "summed first": (
        Variant(dtype=torch.float16, residual="parallel_sum", norm="layer"),
        16,
        DOUBLE,
        PARALLEL,
    ),
    "sandwich": (Variant(dtype=torch.float16, residual="sandwich", norm="layer"), 16, DOUBLE, SEQUENTIAL),
    "tokens, warm": (
        Variant(dtype=torch.float16, tokens=True, warm=True, norm="layer"),
        16,
        DOUBLE,
        SEQUENTIAL,
    ),
    "selected before the norm": (
        Variant(dtype=torch.float16, head="last_first", norm="layer"),
        16,
        DOUBLE,
        SEQUENTIAL,
    ),
}


def narrow_decoder(variant: Variant, path: Path) -> onnx.ModelProto:
    """A float16 decoder whose written-out LayerNorms compute in float16, as other exporters write them.

    The TorchScript exporter's casts to double go, and with them its constants in double.
    """
    _, proto = hand_decoder(variant, path, opset=16)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == DOUBLE:
                attribute.i = HALF
            if node.op_type == "Constant" and attribute.t.data_type == DOUBLE:
                values = numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(numpy_helper.from_array(values))
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)
    return proto


def found_in(model: onnx.ModelProto) -> tuple[NormPrecision, ...]:
    return norm_precisions(model, find_residual_stream(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_norm_of_the_stream_is_found_with_its_type(name: str, tmp_path: Path) -> None:
    variant, opset, elem_type, blocks = VARIANTS[name]
    _, proto = hand_decoder(variant, tmp_path / "model.onnx", opset=opset)
    norms = found_in(proto)
    assert [norm.block for norm in norms] == blocks
    assert {norm.elem_type for norm in norms} == {elem_type}
    assert len({norm.node for norm in norms}) == len(norms)
    assert not any(norm.runtime_decides for norm in norms)


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_sum", "sandwich"])
@pytest.mark.parametrize("head", ["all", "last_first"])
def test_norms_that_are_not_widened_square_in_float16(residual: str, head: str, tmp_path: Path) -> None:
    variant = Variant(dtype=torch.float16, norm="layer", residual=residual, head=head)
    norms = found_in(narrow_decoder(variant, tmp_path / "model.onnx"))
    blocks = PARALLEL if residual == "parallel_sum" else SEQUENTIAL
    assert [(norm.block, norm.elem_type) for norm in norms] == [(block, HALF) for block in blocks]


def test_every_exporters_graph_squares_in_float32(standard_decoder: TinyDecoder) -> None:
    norms = found_in(standard_decoder.proto)
    assert [(norm.block, norm.elem_type) for norm in norms] == [(block, FLOAT) for block in SEQUENTIAL]


def test_fused_sums_leave_their_precision_to_the_runtime(fused_decoder: TinyDecoder) -> None:
    norms = found_in(fused_decoder.proto)
    assert [norm.block for norm in norms] == SEQUENTIAL
    assert [norm.runtime_decides for norm in norms] == [
        norm.node.startswith("SkipSimplifiedLayerNormalization") for norm in norms
    ]
    assert sum(norm.runtime_decides for norm in norms) == 5


@pytest.mark.parametrize(
    "site", [Site.BLOCK_INPUT, Site.BLOCK_OUTPUT, Site.FINAL_NORM_OUTPUT], ids=lambda site: site.value
)
@pytest.mark.parametrize("positions", [Positions.LAST, Positions.ALL])
@pytest.mark.parametrize("op", ["add", "project"])
def test_a_steered_graph_has_the_same_norms(
    op: str, site: Site, positions: Positions, tmp_path: Path
) -> None:
    proto = narrow_decoder(Variant(dtype=torch.float16, norm="layer"), tmp_path / "model.onnx")
    layers = range(HAND_LAYERS) if site is not Site.FINAL_NORM_OUTPUT else [HAND_LAYERS - 1]
    edits = tuple(
        one_edit(op, site, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer) for layer in layers
    )
    result = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits))
    before = [(norm.node, norm.block, norm.elem_type) for norm in found_in(proto)]
    for stream in (result.stream, find_residual_stream(result.model)):
        after = norm_precisions(result.model, stream)
        assert [(norm.node, norm.block, norm.elem_type) for norm in after] == before


@pytest.mark.parametrize("op", ["Mul", "ReduceSumSquare", "ReduceL2"])
def test_other_ways_to_square(op: str, tmp_path: Path) -> None:
    proto = narrow_decoder(Variant(dtype=torch.float16, norm="layer"), tmp_path / "model.onnx")
    before = found_in(proto)
    squares = [node for node in proto.graph.node if node.op_type == "Pow"]
    assert len(squares) == len(before)
    for node in squares:
        node.op_type = op
        del node.input[1:]
        node.input.extend([node.input[0]] if op == "Mul" else [])
    after = found_in(proto)
    assert [norm.node.split()[0] for norm in after] == [op] * len(before)
    assert [(n.tensor, n.block, n.elem_type) for n in after] == [
        (n.tensor, n.block, n.elem_type) for n in before
    ]


def test_a_product_of_the_stream_with_something_else_is_no_square(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(norm="layer"), tmp_path / "model.onnx", opset=16)
    squares = [node for node in proto.graph.node if node.op_type == "Pow"]
    squares[0].op_type = "Mul"
    assert len(found_in(proto)) == len(SEQUENTIAL) - 1


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize(("stash", "expected"), [(None, FLOAT), (FLOAT, FLOAT), (HALF, HALF)])
def test_norm_operators_compute_in_the_type_they_stash(
    op: str, stash: int | None, expected: int, tmp_path: Path
) -> None:
    _, proto = hand_decoder(Variant(dtype=torch.float16, norm="layer"), tmp_path / "model.onnx", opset=17)
    for node in proto.graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type = op
            kept = [attribute for attribute in node.attribute if attribute.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend([] if stash is None else [helper.make_attribute("stash_type", stash)])
    norms = found_in(proto)
    assert [norm.block for norm in norms] == SEQUENTIAL
    assert {norm.elem_type for norm in norms} == {expected}


def test_fused_sums_in_float16_are_of_the_streams_type(fused_decoder: TinyDecoder, tmp_path: Path) -> None:
    """A hand-made float16 version: types of the stream and of scales are changed, values do not matter."""
    proto = onnx.ModelProto()
    proto.CopyFrom(fused_decoder.proto)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = HALF
    norms = found_in(proto)
    assert {(norm.runtime_decides, norm.elem_type) for norm in norms} == {(False, FLOAT), (True, HALF)}


def test_a_cast_of_the_embedding_alone_does_not_widen_the_stream(tmp_path: Path) -> None:
    """A float32 embedding before a float16 stream: block 0's first norm squares what it was cast to."""
    proto = narrow_decoder(Variant(dtype=torch.float16, norm="layer"), tmp_path / "model.onnx")
    start = find_residual_stream(proto).blocks[0].input
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            if name == start:
                node.input[position] = "narrowed"
    proto.graph.node.insert(0, helper.make_node("Cast", [start], ["narrowed"], "narrow", to=HALF))
    next(value for value in proto.graph.input if value.name == start).type.tensor_type.elem_type = FLOAT
    edit = Add(0, random_vector(HAND_WIDTH, seed=0))
    steered = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,))).model
    for model in (proto, steered):
        norms = found_in(model)
        assert [(norm.block, norm.elem_type) for norm in norms] == [(block, HALF) for block in SEQUENTIAL]


def test_a_norm_that_reads_the_embedding_before_its_cast_squares_in_the_embeddings_type(
    tmp_path: Path,
) -> None:
    proto = narrow_decoder(Variant(dtype=torch.float16, norm="layer"), tmp_path / "model.onnx")
    start = find_residual_stream(proto).blocks[0].input
    residual = next(node for node in proto.graph.node if node.op_type == "Add" and start in node.input)
    residual.input[list(residual.input).index(start)] = "narrowed"
    square = next(node for node in proto.graph.node if node.op_type == "Pow")
    cast = next(node for node in proto.graph.node if node.output[0] == square.input[0])
    square.input[0] = cast.input[0]
    proto.graph.node.insert(0, helper.make_node("Cast", [start], ["narrowed"], "narrow", to=HALF))
    next(value for value in proto.graph.input if value.name == start).type.tensor_type.elem_type = FLOAT
    stream = find_residual_stream(proto)
    assert (stream.blocks[0].input, stream.other_types) == (start, ((start, FLOAT),))
    assert [norm.elem_type for norm in norm_precisions(proto, stream)] == [FLOAT] + [HALF] * 6


def test_types_by_what_they_hold() -> None:
    assert largest_finite(HALF) == 65504
    assert largest_finite(BFLOAT) == pytest.approx(3.3895e38, rel=1e-4)
    assert largest_finite(FLOAT) == pytest.approx(3.4028e38, rel=1e-4)
    assert narrowest_type([FLOAT, HALF, BFLOAT]) == HALF
    assert narrowest_type([FLOAT, BFLOAT]) == BFLOAT
    assert [type_name(kind) for kind in (FLOAT, HALF, BFLOAT)] == ["float32", "float16", "bfloat16"]
