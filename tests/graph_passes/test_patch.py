"""A patched graph does what the eager steered model does: the parity test of every operation.

Compared are logits, keys and values, and the effect (steered − unsteered), in ONNX Runtime on CPU, in prefill
and in decode over a KV cache, with every kind of padding, for graphs of three exporters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from calibration.errors import InputError, SiteNotFoundError, UnsupportedError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from calibration.steered import steered
from calibration.token_positions import position_ids
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import PatchResult, patch_model
from graph_passes.plan_names import CONSTANTS_KEY, FINGERPRINT_KEY, PLAN_KEY, metadata
from graph_passes.selection import LastFrom, SteeringInputs
from graph_passes.steering_in import constants_digest
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, padded, plan_of, random_basis, random_vector
from tests.decoders import (
    HAND_LAYERS,
    HAND_WIDTH,
    TinyDecoder,
    Variant,
    hand_decoder,
    hand_feeds,
    no_past,
    run_eager,
    run_graph,
    session,
)
from tests.graph_passes.test_residual_stream import VARIANTS
from tests.reference import literally_steered

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
KINDS = [(op, site, positions) for op in ("add", "project") for site, positions in SITES]

OUTPUT_ATOL = 2e-5
"""float32 sums in another order than PyTorch's: measured at most 3e-6 on logits of magnitude up to 7."""
EFFECT_COSINE = 0.9999
EFFECT_NORM_RTOL = 1e-3
"""Measured: cosine above 1 − 1e-8 and norm ratio within 1e-5; the limits are those of the parity table."""

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


def edit_of(op: str, site: Site, positions: Positions, layer: int = 1) -> Edit:
    return one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=layer)


def graph_session(decoder: TinyDecoder, model: onnx.ModelProto) -> object:
    return session(model, decoder.path.parent)


def passes(decoder: TinyDecoder, plan: SteeringPlan) -> Iterator[tuple[Arguments, list[torch.Tensor]]]:
    """Prefill and one decode step under each padding: what to feed, and what the oracle answers."""
    for seed, padding in enumerate(("none", "left", "right")):
        generator = torch.Generator().manual_seed(seed)
        mask = padded(padding)
        embeds = torch.randn(*mask.shape, WIDTH, generator=generator)
        arguments: Arguments = (embeds, mask, position_ids(mask), no_past(len(mask)))
        with steered(decoder.model, plan):
            outputs = run_eager(decoder.model, *arguments)
        yield arguments, outputs
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
        embeds = torch.randn(len(mask), 1, WIDTH, generator=generator)
        arguments = (embeds, mask, position_ids(mask)[:, -1:], outputs[1:])
        with steered(decoder.model, plan):
            outputs = run_eager(decoder.model, *arguments)
        yield arguments, outputs


def assert_parity(decoder: TinyDecoder, plan: SteeringPlan, result: PatchResult) -> None:
    plain, engine = (graph_session(decoder, model) for model in (decoder.proto, result.model))
    count = 0
    for arguments, oracle in passes(decoder, plan):
        count += 1
        attended_BT = arguments[1].bool().numpy()
        attended_BS = attended_BT[:, -arguments[0].shape[1] :]
        before = list(run_graph(plain, *arguments).values())  # type: ignore[arg-type]
        after = list(run_graph(engine, *arguments).values())  # type: ignore[arg-type]
        eager = [tensor.numpy() for tensor in run_eager(decoder.model, *arguments)]
        oracle = [tensor.numpy() for tensor in oracle]
        np.testing.assert_allclose(after[0][attended_BS], oracle[0][attended_BS], rtol=0, atol=OUTPUT_ATOL)
        for got, expected in zip(after[1:], oracle[1:], strict=True):
            assert got.shape == expected.shape
            columns = got.swapaxes(1, 2)[attended_BT], expected.swapaxes(1, 2)[attended_BT]
            np.testing.assert_allclose(*columns, rtol=0, atol=OUTPUT_ATOL)
        for row, attended_S in enumerate(attended_BS):
            got = (after[0] - before[0])[row][attended_S].ravel()
            expected = (oracle[0] - eager[0])[row][attended_S].ravel()
            norms = np.linalg.norm(got), np.linalg.norm(expected)
            assert norms[1] > 0.1
            assert got @ expected / norms[0] / norms[1] >= EFFECT_COSINE
            assert abs(norms[0] / norms[1] - 1) <= EFFECT_NORM_RTOL
    assert count == 6


@pytest.mark.parametrize(("op", "site", "positions"), KINDS)
def test_every_edit_acts_as_in_the_eager_model(
    any_decoder: TinyDecoder, op: str, site: Site, positions: Positions
) -> None:
    plan = plan_of(edit_of(op, site, positions))
    assert_parity(any_decoder, plan, patch_model(any_decoder.proto, plan))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("site", [Site.BLOCK_INPUT, Site.BLOCK_OUTPUT])
def test_every_block_can_be_steered(exported_decoder: TinyDecoder, site: Site, layer: int) -> None:
    """The input of block 0 is a graph input: it keeps its name and its readers read another."""
    plan = plan_of(
        edit_of("add", site, Positions.LAST, layer), edit_of("project", site, Positions.ALL, layer)
    )
    assert_parity(exported_decoder, plan, patch_model(exported_decoder.proto, plan))


def test_many_edits_act_in_order(any_decoder: TinyDecoder) -> None:
    """Edits that share a tensor do not commute: the graph follows the order of the eager model."""
    first = Project(1, random_basis(WIDTH, 8, seed=2), site=Site.BLOCK_INPUT, positions=Positions.ALL)
    add = Add(0, random_vector(WIDTH, seed=0, scale=2), positions=Positions.ALL)
    project = Project(
        0, random_basis(WIDTH, 8, seed=1), random_vector(WIDTH, seed=9), positions=Positions.LAST
    )
    more = [edit_of(*kind, layer=layer) for kind in KINDS for layer in (0, 2)]
    plan = plan_of(first, add, project, *more)
    result = patch_model(any_decoder.proto, plan)
    assert [edit.number for edit in result.edits] == list(range(len(plan.edits)))
    assert_parity(any_decoder, plan, result)


@pytest.mark.parametrize("control", ["unsteered", "sign", "layer", "positions", "strength"])
def test_parity_fails_for_a_wrong_graph(exported_decoder: TinyDecoder, control: str) -> None:
    """The comparison above can fail: each negative control is told from the real thing."""
    edit = edit_of("add", Site.BLOCK_OUTPUT, Positions.LAST)
    wrong = {
        "unsteered": dataclasses.replace(edit, strength=0.0),
        "sign": dataclasses.replace(edit, strength=-edit.strength),
        "layer": dataclasses.replace(edit, layer=0),
        "positions": dataclasses.replace(edit, positions=Positions.ALL),
        "strength": dataclasses.replace(edit, strength=edit.strength * 1.01),
    }[control]
    result = patch_model(exported_decoder.proto, plan_of(wrong))
    with pytest.raises(AssertionError):
        assert_parity(exported_decoder, plan_of(edit), result)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_decoder_is_steered_by_the_equations(variant: Variant, tmp_path: Path) -> None:
    model, proto = hand_decoder(variant, tmp_path / "model.onnx")
    edits = [
        one_edit(op, site, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=layer)
        for layer, (op, site, positions) in enumerate(KINDS[:2] + KINDS[2:4] + KINDS[10:])
        if layer < HAND_LAYERS
    ] + [one_edit(*kind, width=HAND_WIDTH, layers=HAND_LAYERS, layer=0) for kind in KINDS]
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    last_from = LastFrom.ATTENTION_MASK if variant.mask else LastFrom.SEQUENCE
    result = patch_model(proto, plan, inputs=SteeringInputs(last_from=last_from))
    sample = model.sample(seed=5)
    total = sample[0].shape[1] + (3 if variant.cache else 0)
    mask = sample[1] if variant.mask else torch.ones(2, total, dtype=torch.long)
    if variant.mask:
        mask[1, -1] = 0  # padded on the right
    with torch.inference_mode():
        plain = model(*sample)
        with literally_steered(model.blocks, model.norm, plan, mask):
            expected = model(*sample)
    got = session(result.model).run(None, hand_feeds(proto, sample))
    wanted = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    attended = mask[:, -got[0].shape[1] :].bool()  # one position where the graph gives the last alone
    np.testing.assert_allclose(got[0][attended], wanted[0][attended], rtol=0, atol=OUTPUT_ATOL)
    reference = plain if isinstance(plain, torch.Tensor) else plain[0]
    assert (wanted[0] - reference)[attended].abs().max() > 1000 * OUTPUT_ATOL
    for one, other in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(
            one.swapaxes(1, 2)[mask.bool()], other.transpose(1, 2)[mask.bool()], rtol=0, atol=OUTPUT_ATOL
        )


@pytest.mark.parametrize("opset", [13, 18])
def test_older_and_newer_opsets_are_steered_alike(opset: int, tmp_path: Path) -> None:
    model, proto = hand_decoder(Variant(), tmp_path / "model.onnx", opset=opset)
    edits = tuple(one_edit(*kind, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1) for kind in KINDS)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)
    result = patch_model(proto, plan)
    onnx.checker.check_model(result.model, full_check=True)
    sample = model.sample(seed=5)
    with torch.inference_mode(), literally_steered(model.blocks, model.norm, plan, sample[1]):
        expected = model(*sample)
    got = session(result.model).run(None, hand_feeds(proto, sample))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=OUTPUT_ATOL)


def test_operators_may_name_their_domain(tmp_path: Path) -> None:
    """Some exporters write `ai.onnx` where others write nothing."""
    model, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    (entry,) = proto.opset_import
    entry.domain = "ai.onnx"
    edits = tuple(one_edit(*kind, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1) for kind in KINDS)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)
    result = patch_model(proto, plan)
    sample = model.sample(seed=5)
    with torch.inference_mode(), literally_steered(model.blocks, model.norm, plan, sample[1]):
        expected = model(*sample)
    got = session(result.model).run(None, hand_feeds(proto, sample))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=OUTPUT_ATOL)


# ------------------------------------------------------------------------------------------------ strength 0


def test_strength_zero_is_exact_to_the_bit(any_decoder: TinyDecoder) -> None:
    edits = [
        dataclasses.replace(edit_of(*kind, layer=layer), strength=0.0)
        for kind in KINDS
        for layer in range(LAYERS)
    ]
    plan = plan_of(*edits)
    result = patch_model(any_decoder.proto, plan)
    plain, engine = (graph_session(any_decoder, model) for model in (any_decoder.proto, result.model))
    for arguments, _ in passes(any_decoder, plan):
        before, after = run_graph(plain, *arguments), run_graph(engine, *arguments)  # type: ignore[arg-type]
        assert before.keys() == after.keys()
        for name, expected in before.items():
            assert after[name].tobytes() == expected.tobytes(), name


# ------------------------------------------------------------------------------------------------- interface


def test_only_the_graph_between_the_steered_tensors_changes(exported_decoder: TinyDecoder) -> None:
    before = exported_decoder.proto
    snapshot = before.SerializeToString(deterministic=True)
    plan = plan_of(*(edit_of(*kind, layer=layer) for kind in KINDS for layer in range(LAYERS)))
    result = patch_model(before, plan)
    after = result.model
    assert before.SerializeToString(deterministic=True) == snapshot
    for field in ("input", "output", "sparse_initializer", "quantization_annotation", "metadata_props"):
        assert list(getattr(after.graph, field)) == list(getattr(before.graph, field)), field
    for field in ("opset_import", "functions", "ir_version", "producer_name", "doc_string", "domain"):
        assert getattr(after, field) == getattr(before, field), field
    assert list(after.graph.initializer)[: len(before.graph.initializer)] == list(before.graph.initializer)
    added = list(after.graph.initializer)[len(before.graph.initializer) :]
    assert {tensor.name for tensor in added} >= {name for edit in result.edits for name in edit.constants}
    types = list(after.graph.value_info)
    assert types[: len(before.graph.value_info)] == list(before.graph.value_info)
    named = {PLAN_KEY: plan.digest(), CONSTANTS_KEY: constants_digest(after)}
    assert metadata(after) == metadata(before) | named
    kept = [node for node in after.graph.node if not node.name.startswith("sarsteer.")]
    anchors = {edit.anchor for edit in result.edits}
    for old, new in zip(before.graph.node, kept, strict=True):
        assert list(old.metadata_props) == list(new.metadata_props)
        assert len(old.metadata_props) > 0
        assert list(old.attribute) == list(new.attribute)
        assert [name.removeprefix(UNSTEERED_PREFIX) for name in new.output] == list(old.output)
        assert [name.removeprefix(STEERED_PREFIX) for name in new.input] == list(old.input)
        assert {name for name in new.output if name.startswith(UNSTEERED_PREFIX)} == {
            UNSTEERED_PREFIX + name for name in old.output if name in anchors
        }


def test_metadata_that_the_graph_carries_survives(exported_decoder: TinyDecoder) -> None:
    proto = copy_of(exported_decoder.proto)
    helper.set_model_props(proto, {"mine": "kept", FINGERPRINT_KEY: "ab"})
    result = patch_model(proto, plan_of(edit_of(*KINDS[0])))
    assert metadata(result.model)["mine"] == "kept"
    assert metadata(result.model)[FINGERPRINT_KEY] == "ab"


def test_the_patched_graph_passes_onnxs_own_checker(standard_decoder: TinyDecoder, tmp_path: Path) -> None:
    plan = plan_of(*(edit_of(*kind, layer=layer) for kind in KINDS for layer in range(LAYERS)))
    model = patch_model(standard_decoder.proto, plan).model
    path = standard_decoder.path.with_name("checked.onnx")  # beside its external data
    write_graph(model, path)
    onnx.checker.check_model(path, full_check=True)
    path.unlink()


def test_weights_in_external_data_are_neither_read_nor_written(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "whole.onnx")
    source = tmp_path / "model.onnx"
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = tmp_path / "weights.bin"
    data.write_bytes(b"\xff" * data.stat().st_size)  # nonsense: whoever reads it writes nonsense
    before = data.stat()
    model = read_graph(source)
    edits = tuple(one_edit(*kind, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1) for kind in KINDS)
    result = patch_model(model, SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits))
    write_graph(result.model, tmp_path / "steered.onnx")
    after = data.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (
        before.st_mtime_ns,
        before.st_size,
        before.st_ino,
    )
    assert data.read_bytes() == b"\xff" * before.st_size
    again = read_graph(tmp_path / "steered.onnx")
    old = {tensor.name: tensor for tensor in model.graph.initializer}
    new = {tensor.name: tensor for tensor in again.graph.initializer}
    assert any(tensor.external_data for tensor in old.values())
    assert {name: new[name] for name in old} == old
    assert all(not new[name].external_data for name in new.keys() - old.keys())
    assert (tmp_path / "steered.onnx").stat().st_size < 200_000


# ------------------------------------------------------------------------------------------ names, constants


def test_names_are_unique_stable_and_say_where_an_edit_stands(exported_decoder: TinyDecoder) -> None:
    add = edit_of("add", Site.BLOCK_OUTPUT, Positions.LAST)
    plan = plan_of(add, add, edit_of("project", Site.BLOCK_INPUT, Positions.ALL, 0))
    result, again = (patch_model(exported_decoder.proto, plan) for _ in range(2))
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(
        deterministic=True
    )
    assert [edit.constants for edit in result.edits] == [
        ("sarsteer.1.block_output.add.0.vector", "sarsteer.1.block_output.add.0.nothing"),
        ("sarsteer.1.block_output.add.1.vector", "sarsteer.1.block_output.add.1.nothing"),
        (
            "sarsteer.0.block_input.project.0.mean",
            "sarsteer.0.block_input.project.0.basis",
            "sarsteer.0.block_input.project.0.basis_scaled",
        ),
    ]
    for edit, asked in zip(result.edits, plan.edits, strict=True):
        assert (edit.layer, edit.site, edit.op, edit.positions, edit.strength) == (
            asked.layer,
            asked.site,
            asked.op,
            asked.positions.value,
            asked.strength,
        )
    graph = result.model.graph
    nodes = [node.name for node in graph.node]
    tensors = [name for node in graph.node for name in node.output] + [t.name for t in graph.initializer]
    assert len(nodes) == len(set(nodes))
    assert len(tensors) == len(set(tensors))
    for edit in result.edits:
        assert set(edit.nodes) <= set(nodes)
        assert set(edit.constants) <= {tensor.name for tensor in graph.initializer}


def constants_of(result: PatchResult) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in result.model.graph.initializer
        if tensor.name.startswith("sarsteer.")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constants_are_float32_products_rounded_once_to_the_streams_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    vector = random_vector(HAND_WIDTH, seed=0)
    vector[3] = 0
    add = Add(1, vector, strength=0.1)
    project = Project(1, random_basis(HAND_WIDTH, 3, seed=1), vector, strength=0.3)
    result = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (add, project)))
    onnx.checker.check_model(result.model, full_check=True)
    constants = constants_of(result)
    scaled = constants["sarsteer.1.block_output.add.0.vector"]
    expected = (torch.tensor(0.1, dtype=torch.float32) * torch.from_numpy(vector.copy())).to(dtype)
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    assert scaled.dtype.name == names[dtype]
    np.testing.assert_array_equal(scaled.astype(np.float32), expected.float())
    assert np.signbit(scaled[3].astype(np.float32))  # −0 is added where nothing is to be added
    once_too_often = (expected.new_tensor(0.1) * torch.from_numpy(vector.copy()).to(dtype)).float().numpy()
    assert (dtype is torch.float32) or (scaled.astype(np.float32) != once_too_often).any()
    stem = "sarsteer.1.block_output.project.0"
    for key, value in {
        "basis": project.basis,
        "mean": project.mean,
        "basis_scaled": (np.float32(0.3) * project.basis).T,
    }.items():
        assert constants[f"{stem}.{key}"].dtype == np.float32
        np.testing.assert_array_equal(constants[f"{stem}.{key}"], value)


def test_equal_vectors_in_two_layers_stay_two_constants(exported_decoder: TinyDecoder) -> None:
    """A refit of one layer must not change the other."""
    vector = random_vector(WIDTH, seed=0)
    constants = constants_of(patch_model(exported_decoder.proto, plan_of(Add(0, vector), Add(1, vector))))
    for layer in (0, 1):
        np.testing.assert_array_equal(constants[f"sarsteer.{layer}.block_output.add.0.vector"], vector)


@pytest.mark.parametrize("positions", [Positions.LAST, Positions.ALL])
@pytest.mark.parametrize("op", ["add", "project"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_low_precision_edit_is_one_rounding_of_a_float32_term(
    dtype: torch.dtype, op: str, positions: Positions, tmp_path: Path
) -> None:
    """The inserted nodes alone, in ONNX's reference evaluator, equal PyTorch bit for bit.

    ONNX Runtime's CPU provider widens float16 and lacks bfloat16; it cannot judge this.
    """
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    edit = one_edit(op, Site.BLOCK_OUTPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=0)
    result = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,)))
    graph, anchor, start = result.model.graph, result.edits[0].anchor, result.stream.blocks[0].input
    value = helper.make_tensor_value_info
    kind = result.stream.elem_type
    inputs = [
        value(UNSTEERED_PREFIX + anchor, kind, [2, 4, HAND_WIDTH]),
        value(start, kind, [2, 4, HAND_WIDTH]),
    ]
    inserted = helper.make_graph(
        [node for node in graph.node if node.name.startswith("sarsteer.")],
        "inserted",
        [*inputs, value("attention_mask", TensorProto.INT64, [2, 4])],
        [value(anchor, kind, [2, 4, HAND_WIDTH])],
        [tensor for tensor in graph.initializer if tensor.name.startswith("sarsteer.")],
    )
    hidden = (3 * torch.randn(2, 4, HAND_WIDTH, generator=torch.Generator().manual_seed(0))).to(dtype)
    stored = hidden.float().numpy().astype(helper.tensor_dtype_to_np_dtype(kind))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    feeds = {UNSTEERED_PREFIX + anchor: stored, start: stored, "attention_mask": mask}
    model = helper.make_model(inserted, opset_imports=result.model.opset_import)
    (got,) = ReferenceEvaluator(model).run(None, feeds)
    if isinstance(edit, Add):
        everywhere = hidden + torch.from_numpy(np.float32(edit.strength) * edit.vector).to(dtype)
    else:
        assert edit.mean is not None
        coordinates = (hidden.float().numpy() - edit.mean) @ edit.basis
        delta = coordinates @ (np.float32(edit.strength) * edit.basis).T
        everywhere = hidden - torch.from_numpy(delta).to(dtype)
    expected = hidden.clone()
    rows, columns = ([0, 1], [3, 1]) if positions is Positions.LAST else (slice(None), slice(None))
    expected[rows, columns] = everywhere[rows, columns]
    assert got.dtype == stored.dtype
    np.testing.assert_array_equal(got.astype(np.float32), expected.float())
    assert (expected != hidden).any()


def test_a_constant_that_overflows_the_streams_dtype_is_refused(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=torch.float16), tmp_path / "model.onnx")
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (Add(0, np.full(HAND_WIDTH, 1e3, "f4"), strength=100),))
    with pytest.raises(InputError, match=r"magnitude 100000 overflows the stream's float16"):
        patch_model(proto, plan)


def test_an_embedding_of_another_dtype_is_edited_in_its_own(tmp_path: Path) -> None:
    from tests.graph_passes.test_residual_stream import _with_cast_embedding

    proto = _with_cast_embedding(tmp_path)
    skip = next(n for n in proto.graph.node if n.op_type == "Add" and "narrow_embeds" in n.input)
    skip.input[list(skip.input).index("narrow_embeds")] = "second_cast"
    second = helper.make_node("Cast", ["inputs_embeds"], ["second_cast"], to=TensorProto.FLOAT16)
    proto.graph.node.insert(0, second)
    edit = Add(0, random_vector(HAND_WIDTH, seed=0), site=Site.BLOCK_INPUT)
    result = patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,)))
    onnx.checker.check_model(result.model, full_check=True)
    assert constants_of(result)["sarsteer.0.block_input.add.0.vector"].dtype == np.float32


# ------------------------------------------------------------------------------------------------- refusals


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_a_steered_graph_is_not_steered_again(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(edit_of(*KINDS[0]))
    once = patch_model(exported_decoder.proto, plan).model
    with pytest.raises(InputError, match=f"steered already, by plan {plan.digest()[:12]}"):
        patch_model(once, plan)
    del once.metadata_props[:]
    with pytest.raises(InputError, match=r"steered already: it holds 'sarsteer\.1\.block_input\.add\.0\."):
        patch_model(once, plan)


@pytest.mark.parametrize("force", [False, True])
def test_a_plan_of_another_shape_is_refused(exported_decoder: TinyDecoder, force: bool) -> None:
    wide = SteeringPlan(WIDTH + 1, LAYERS, (Add(0, random_vector(WIDTH + 1, seed=0)),))
    with pytest.raises(InputError, match=f"width {WIDTH + 1}; this decoder's width is {WIDTH}"):
        patch_model(exported_decoder.proto, wide, force=force)
    deep = SteeringPlan(WIDTH, LAYERS + 1, (Add(0, random_vector(WIDTH, seed=0)),))
    with pytest.raises(InputError, match=f"{LAYERS + 1} decoder blocks; this decoder has {LAYERS} blocks"):
        patch_model(exported_decoder.proto, deep, force=force)


def test_a_plan_of_another_model_is_refused_unless_forced(exported_decoder: TinyDecoder) -> None:
    proto = copy_of(exported_decoder.proto)
    helper.set_model_props(proto, {FINGERPRINT_KEY: "ab" * 32})
    plan = dataclasses.replace(plan_of(edit_of(*KINDS[0])), provenance={"model_fingerprint": "cd" * 32})
    with pytest.raises(InputError, match="made for another model"):
        patch_model(proto, plan)
    assert len(patch_model(proto, plan, force=True).edits) == 1
    assert len(patch_model(exported_decoder.proto, plan).edits) == 1  # the graph does not say whose it is


def test_without_a_mask_last_must_be_asked_for(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(mask=False), tmp_path / "model.onnx")
    last = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (Add(0, random_vector(HAND_WIDTH, seed=0)),))
    with pytest.raises(UnsupportedError, match=r"no input 'attention_mask' .* use --last-from sequence"):
        patch_model(proto, last)
    assert len(patch_model(proto, last, inputs=SteeringInputs(last_from=LastFrom.SEQUENCE)).edits) == 1
    everywhere = (dataclasses.replace(last.edits[0], positions=Positions.ALL),)
    assert len(patch_model(proto, dataclasses.replace(last, edits=everywhere)).edits) == 1


def test_last_from_sequence_ignores_the_mask(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(edit_of("add", Site.BLOCK_OUTPUT, Positions.LAST))
    by_mask = patch_model(exported_decoder.proto, plan)
    by_sequence = patch_model(
        exported_decoder.proto, plan, inputs=SteeringInputs(last_from=LastFrom.SEQUENCE)
    )
    mask = padded("left")
    embeds = torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(0))

    def logits(result: PatchResult, mask: torch.Tensor) -> np.ndarray:
        runner = graph_session(exported_decoder, result.model)
        outputs = run_graph(runner, embeds, mask, position_ids(mask), no_past(len(mask)))  # type: ignore[arg-type]
        return next(iter(outputs.values()))[mask.bool().numpy()]

    np.testing.assert_array_equal(logits(by_sequence, mask), logits(by_mask, mask))
    right = padded("right")
    assert np.abs(logits(by_sequence, right) - logits(by_mask, right)).max() > 0.01


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx", opset=13)
    proto.opset_import[0].version = 12
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (Add(0, random_vector(HAND_WIDTH, seed=0)),))
    with pytest.raises(UnsupportedError, match="opset is 12; expected at least 13"):
        patch_model(proto, plan)


def test_bfloat16_needs_a_newer_opset(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=torch.bfloat16), tmp_path / "model.onnx")
    proto.opset_import[0].version = 15
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (Add(0, random_vector(HAND_WIDTH, seed=0)),))
    with pytest.raises(UnsupportedError, match="opset is 15; a bfloat16 stream needs at least 16"):
        patch_model(proto, plan)


def test_a_missing_final_norm_is_refused(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(head="last_first"), tmp_path / "model.onnx")
    edit = Add(HAND_LAYERS - 1, random_vector(HAND_WIDTH, seed=0), site=Site.FINAL_NORM_OUTPUT)
    with pytest.raises(SiteNotFoundError, match="no final norm over every position"):
        patch_model(proto, SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,)))


def test_a_row_that_attends_to_nothing_is_not_edited(tmp_path: Path) -> None:
    model, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (Add(0, random_vector(HAND_WIDTH, seed=0, scale=9)),))
    sample = model.sample(sequence=2, past=3)
    sample[1][1, -2:] = 0
    feeds = hand_feeds(proto, sample)
    plain, got = (session(m).run(None, feeds)[0] for m in (proto, patch_model(proto, plan).model))
    np.testing.assert_array_equal(got[1], plain[1])
    np.testing.assert_array_equal(got[0, 0], plain[0, 0])
    assert np.abs(got[0, 1] - plain[0, 1]).max() > 0.1
