"""What a block is made of, for every way in which the graphs of the tests write one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph_passes.block_structure import block_sums, final_norm
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, plan_of
from tests.decoders import HAND_LAYERS, TinyDecoder, Variant, hand_decoder
from tests.graph_passes.test_transparent import quantise

SEQUENTIAL = [["norm", "attention"]], [["norm", "mlp"]]
SANDWICH = [["norm", "attention", "norm"]], [["norm", "mlp", "norm"]]
CASES = {
    "sequential": (Variant(), SEQUENTIAL, [False, False]),
    "layer norm": (Variant(norm="layer"), SEQUENTIAL, [False, False]),
    "float16": (Variant(dtype=torch.float16), SEQUENTIAL, [False, False]),
    "no cache": (Variant(cache=False), SEQUENTIAL, [False, False]),
    "experts": (Variant(experts=True, cache=False), SEQUENTIAL, [False, False]),
    "sandwich": (Variant(residual="sandwich", norm="rms_gemma"), SANDWICH, [False, False]),
    "parallel": (Variant(residual="parallel"), ([["norm", "attention"], ["norm", "mlp"]],), [False]),
    "parallel, one norm": (Variant(residual="parallel_sum"), ([["attention"], ["mlp"]],), [True]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_branches_of_a_block(name: str, tmp_path: Path) -> None:
    variant, expected, shared = CASES[name]
    _, model = hand_decoder(variant, tmp_path / "model.onnx")
    stream = find_residual_stream(model)
    for layer in range(HAND_LAYERS):
        sums = block_sums(model, stream, layer)
        kinds = [[[part.kind for part in branch] for branch in total.branches] for total in sums]
        assert [sorted(branches) for branches in kinds] == [sorted(branches) for branches in expected]
        assert [total.shared is not None for total in sums] == shared
        norms = {
            part.title
            for total in sums
            for branch in total.branches
            for part in branch
            if part.kind == "norm"
        }
        norms |= {total.shared.title for total in sums if total.shared is not None}
        assert norms == {"LayerNorm" if variant.norm == "layer" else "RMSNorm"}


@pytest.mark.parametrize("residual", ["parallel", "parallel_sum"])
def test_the_branches_of_parallel_blocks_are_told_apart_through_a_pair(residual: str, tmp_path: Path) -> None:
    """Every sum quantised, also the one of which another sum is made."""
    _, model = hand_decoder(Variant(residual=residual, norm="layer"), tmp_path / "model.onnx")
    stream = find_residual_stream(model)
    expected = [block_sums(model, stream, layer) for layer in range(HAND_LAYERS)]
    for node in [node for node in model.graph.node if node.op_type == "Add"]:
        quantise(model, node.output[0])
    quantised = find_residual_stream(model)
    assert [block_sums(model, quantised, layer) for layer in range(HAND_LAYERS)] == expected
    assert [len(total.branches) for sums in expected for total in sums] == [2] * HAND_LAYERS


def test_matrix_products_are_counted(any_decoder: TinyDecoder) -> None:
    model = any_decoder.proto
    attention, mlp = block_sums(model, find_residual_stream(model), 1)
    (((_, attends),), ((_, multiplies),)) = attention.branches, mlp.branches
    assert attends.details[-1] == "2 attention products, Softmax, KV cache"
    products = [part.details[0].partition(" weight products (MatMul")[0] for part in (attends, multiplies)]
    stored = {(4, 3), (2, 2)}  # fusions join query, key and value, and gate and up
    assert tuple(map(int, products)) in stored
    assert multiplies.details[1:] == ("Sigmoid",)


def test_steering_changes_nothing_of_it(any_decoder: TinyDecoder) -> None:
    edits = [
        one_edit(op, site, positions, width=tiny_lalm.WIDTH, layers=tiny_lalm.LAYERS, layer=layer)
        for op in ("add", "project")
        for site, positions in SITES
        for layer in range(tiny_lalm.LAYERS)
    ]
    model, steered = any_decoder.proto, patch_model(any_decoder.proto, plan_of(*edits)).model
    found = [
        [[(total.shared, total.branches) for total in block_sums(graph, stream, layer)] for layer in range(3)]
        for graph in (model, steered)
        for stream in [find_residual_stream(graph)]
    ]
    assert found[0] == found[1]
    assert all(len(sums) == 2 for sums in found[0])
    assert final_norm(model, find_residual_stream(model)) == final_norm(
        steered, find_residual_stream(steered)
    )


def test_the_final_norm_is_read_or_not_there(tmp_path: Path) -> None:
    _, model = hand_decoder(Variant(norm="layer"), tmp_path / "all.onnx")
    norm = final_norm(model, find_residual_stream(model))
    assert norm is not None
    assert norm.title == "LayerNorm"
    _, model = hand_decoder(Variant(head="last_first"), tmp_path / "last.onnx")
    assert final_norm(model, find_residual_stream(model)) is None
