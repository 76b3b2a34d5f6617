"""Refitting a steered graph gives, byte for byte, the graph that patching with the new plan gives."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graph_passes.refit
from calibration.errors import InputError
from calibration.plan import Add, Edit, Positions, Site, SteeringPlan
from calibration.token_positions import position_ids
from graph_passes.checks import GraphDamagedError
from graph_passes.names import edit_of
from graph_passes.patch import patch_model
from graph_passes.plan_names import CONSTANTS_KEY, FINGERPRINT_KEY, PLAN_KEY, metadata
from graph_passes.refit import plan_constants, refit_model
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
    no_past,
    run_graph,
    session,
)
from tests.graph_passes.test_residual_stream import VARIANTS, _with_cast_embedding

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
KINDS = [(op, site, positions) for op in ("add", "project") for site, positions in SITES]


def refreshed(edit: Edit, seed: int) -> Edit:
    """The same edit with other values throughout."""
    width = edit.tensors()["vector" if isinstance(edit, Add) else "basis"].shape[0]
    if isinstance(edit, Add):
        return dataclasses.replace(edit, vector=random_vector(width, seed=seed), strength=-0.3)
    mean = None if edit.mean is None else random_vector(width, seed=seed)
    basis = random_basis(width, edit.basis.shape[1], seed=seed)
    return dataclasses.replace(edit, basis=basis, mean=mean, strength=0.6)


def refreshed_plan(plan: SteeringPlan) -> SteeringPlan:
    edits = tuple(refreshed(edit, seed) for seed, edit in enumerate(plan.edits, start=100))
    return dataclasses.replace(plan, edits=edits)


def hand_plan(*edits: Edit) -> SteeringPlan:
    return SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)


def every_kind(layers: int, width: int) -> tuple[Edit, ...]:
    return tuple(
        one_edit(*kind, width=width, layers=layers, layer=layer) for layer in range(layers) for kind in KINDS
    )


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def constant(model: onnx.ModelProto, ending: str) -> TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(ending)]
    return found


def node(model: onnx.ModelProto, ending: str) -> onnx.NodeProto:
    (found,) = [node for node in model.graph.node if node.name.endswith(ending)]
    return found


@pytest.fixture(scope="module")
def hand_proto(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A hand-written float32 decoder, unsteered. Read-only for tests."""
    return hand_decoder(Variant(), tmp_path_factory.mktemp("hand") / "model.onnx")[1]


ADD, PROJECT = (
    one_edit(op, Site.BLOCK_OUTPUT, Positions.LAST, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
    for op in ("add", "project")
)


@pytest.fixture
def steered_proto(hand_proto: onnx.ModelProto) -> onnx.ModelProto:
    """The hand-written decoder with one `add` and one `project` on one tensor."""
    return patch_model(hand_proto, hand_plan(ADD, PROJECT)).model


# -------------------------------------------------------------------------------------- equal to patching anew


@pytest.mark.parametrize(("op", "site", "positions"), KINDS)
def test_every_kind_of_edit_alone_is_refitted(
    any_decoder: TinyDecoder, op: str, site: Site, positions: Positions
) -> None:
    for layer in (0, LAYERS - 1):
        old = plan_of(one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=layer))
        new = refreshed_plan(old)
        before, wanted = (patch_model(any_decoder.proto, plan).model for plan in (old, new))
        assert refit_model(before, new).SerializeToString() == wanted.SerializeToString()
        assert before.SerializeToString() != wanted.SerializeToString()


def test_many_edits_are_refitted_and_run_as_patched(any_decoder: TinyDecoder) -> None:
    """In ONNX Runtime, prefill with padded rows: bit for bit the new plan, and not the old one."""
    old = plan_of(*every_kind(LAYERS, WIDTH))
    new = refreshed_plan(old)
    before, wanted = (patch_model(any_decoder.proto, plan).model for plan in (old, new))
    refitted = refit_model(before, new)
    assert refitted.SerializeToString() == wanted.SerializeToString()
    mask = padded("left")
    embeds = torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(0))
    results = [
        run_graph(
            session(model, any_decoder.path.parent), embeds, mask, position_ids(mask), no_past(len(mask))
        )
        for model in (before, wanted, refitted)
    ]
    attended = mask.bool().numpy()
    logits = next(iter(results[0]))
    assert np.abs(results[0][logits][attended] - results[1][logits][attended]).max() > 0.1
    for name, values in results[1].items():
        assert results[2][name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_decoder_and_dtype_is_refitted(
    variant: Variant, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, proto = hand_decoder(dataclasses.replace(variant, dtype=dtype), tmp_path / "model.onnx")
    last_from = LastFrom.ATTENTION_MASK if variant.mask else LastFrom.SEQUENCE
    old = hand_plan(*every_kind(HAND_LAYERS, HAND_WIDTH))
    new = refreshed_plan(old)
    before, wanted = (
        patch_model(proto, plan, inputs=SteeringInputs(last_from=last_from)).model for plan in (old, new)
    )
    assert refit_model(before, new).SerializeToString() == wanted.SerializeToString()


def test_an_embedding_of_another_dtype_is_refitted_in_its_own(tmp_path: Path) -> None:
    """Block 0 reads a float32 graph input, the rest of the stream is float16."""
    proto = _with_cast_embedding(tmp_path)
    skip = next(n for n in proto.graph.node if n.op_type == "Add" and "narrow_embeds" in n.input)
    skip.input[list(skip.input).index("narrow_embeds")] = "second_cast"
    second = helper.make_node("Cast", ["inputs_embeds"], ["second_cast"], to=TensorProto.FLOAT16)
    proto.graph.node.insert(0, second)
    old = hand_plan(*every_kind(HAND_LAYERS, HAND_WIDTH))
    new = refreshed_plan(old)
    before, wanted = (patch_model(proto, plan).model for plan in (old, new))
    types = {tensor.name: tensor.data_type for tensor in wanted.graph.initializer}
    assert types["sarsteer.0.block_input.add.0.vector"] == TensorProto.FLOAT
    assert types["sarsteer.1.block_input.add.0.vector"] == TensorProto.FLOAT16
    assert refit_model(before, new).SerializeToString() == wanted.SerializeToString()


def test_a_refit_keeps_where_the_last_position_is_read_from(hand_proto: onnx.ModelProto) -> None:
    old = hand_plan(ADD)
    by_sequence = patch_model(hand_proto, old, inputs=SteeringInputs(last_from=LastFrom.SEQUENCE)).model
    new = refreshed_plan(old)
    wanted = patch_model(hand_proto, new, inputs=SteeringInputs(last_from=LastFrom.SEQUENCE)).model
    assert refit_model(by_sequence, new).SerializeToString() == wanted.SerializeToString()
    assert refit_model(by_sequence, new) != patch_model(hand_proto, new).model


def test_strength_zero_takes_the_steering_out(hand_proto: onnx.ModelProto) -> None:
    old = hand_plan(*every_kind(HAND_LAYERS, HAND_WIDTH))
    none = dataclasses.replace(old, edits=tuple(dataclasses.replace(e, strength=0.0) for e in old.edits))
    refitted = refit_model(patch_model(hand_proto, old).model, none)
    vectors = [t for t in refitted.graph.initializer if t.name.endswith(".vector")]
    assert len(vectors) == 6 * HAND_LAYERS
    for tensor in vectors:
        values = numpy_helper.to_array(tensor)
        assert (values == 0).all()
        assert np.signbit(values).all()  # −0 leaves every float as it is


def test_refitting_back_gives_the_first_graph(steered_proto: onnx.ModelProto) -> None:
    plan = hand_plan(ADD, PROJECT)
    there = refit_model(steered_proto, refreshed_plan(plan))
    assert there != steered_proto
    assert refit_model(there, plan).SerializeToString() == steered_proto.SerializeToString()


# ------------------------------------------------------------------------------------- nothing but the constants


def test_nothing_but_the_constants_and_the_plans_hash_changes(exported_decoder: TinyDecoder) -> None:
    old = plan_of(*every_kind(LAYERS, WIDTH))
    new = refreshed_plan(old)
    before = patch_model(exported_decoder.proto, old).model
    helper.set_model_props(before, {**metadata(before), "mine": "kept"})
    snapshot = before.SerializeToString()
    after = refit_model(before, new)
    assert before.SerializeToString() == snapshot
    changed = set()
    for one, other in zip(before.graph.initializer, after.graph.initializer, strict=True):
        if one != other:
            changed.add(one.name)
            fields = {field.name for field, _ in one.ListFields()} | {f.name for f, _ in other.ListFields()}
            assert [f for f in fields if getattr(one, f) != getattr(other, f)] == ["raw_data"]
    edits = LAYERS * 6  # of each operation, half of them at last positions, whose `nothing` stays as it is
    assert len(changed) == edits * 1 + edits * 3
    assert all(edit_of(name) is not None for name in changed)
    for field in after.graph.DESCRIPTOR.fields:
        if field.name != "initializer":
            assert getattr(after.graph, field.name) == getattr(before.graph, field.name), field.name
    for field in after.DESCRIPTOR.fields:
        if field.name not in ("graph", "metadata_props"):
            assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert [e.key for e in after.metadata_props] == [e.key for e in before.metadata_props]
    named = {PLAN_KEY: new.digest(), CONSTANTS_KEY: constants_digest(after)}
    assert metadata(after) == metadata(before) | named
    assert metadata(before)[PLAN_KEY] == old.digest() != new.digest()


def test_a_graph_that_lost_its_plans_hash_gets_the_new_one(steered_proto: onnx.ModelProto) -> None:
    del steered_proto.metadata_props[:]
    new = refreshed_plan(hand_plan(ADD, PROJECT))
    refitted = refit_model(steered_proto, new)
    named = {PLAN_KEY: new.digest(), CONSTANTS_KEY: constants_digest(refitted)}
    assert metadata(refitted) == named


def test_constants_that_another_tool_stored_as_numbers_are_replaced(
    hand_proto: onnx.ModelProto, steered_proto: onnx.ModelProto
) -> None:
    tensor = constant(steered_proto, ".vector")
    values = numpy_helper.to_array(tensor).tolist()
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, tensor.dims, values))
    assert tensor.float_data
    new = refreshed_plan(hand_plan(ADD, PROJECT))
    assert (
        refit_model(steered_proto, new).SerializeToString()
        == patch_model(hand_proto, new).model.SerializeToString()
    )


# --------------------------------------------------------------------------------------------- plan constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plan_constants_are_those_that_insertion_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    plan = hand_plan(*every_kind(HAND_LAYERS, HAND_WIDTH))
    result = patch_model(proto, plan)
    written = {
        tensor.name: tensor for tensor in result.model.graph.initializer if edit_of(tensor.name) is not None
    }
    asked = []

    def elem_type_of(name: str) -> int:
        asked.append(name)
        return result.stream.elem_type

    constants = plan_constants(plan, elem_type_of)
    assert constants.keys() == written.keys()
    assert sorted(asked) == sorted({name.rpartition(".")[0] for name in written})
    adds, projects, last = 6 * HAND_LAYERS, 6 * HAND_LAYERS, 6 * HAND_LAYERS
    assert len(constants) == adds + 3 * projects + last
    for name, values in constants.items():
        tensor = numpy_helper.from_array(values, name)
        assert tensor.SerializeToString() == written[name].SerializeToString(), name


# ------------------------------------------------------------------------------------------- which plans fit


def test_a_plan_is_taken_exactly_when_patching_would_differ_in_constants_alone(
    hand_proto: onnx.ModelProto,
) -> None:
    """Every pair of plans of up to two edits, most of them on one stream tensor."""
    place = {"width": HAND_WIDTH, "layers": HAND_LAYERS}
    edits = [
        one_edit("add", Site.BLOCK_OUTPUT, Positions.LAST, layer=0, **place),
        one_edit("project", Site.BLOCK_OUTPUT, Positions.ALL, layer=0, **place),
        one_edit("project", Site.BLOCK_INPUT, Positions.ALL, layer=1, **place),
        one_edit("add", Site.BLOCK_INPUT, Positions.ALL, layer=0, **place),
    ]
    lists = [*itertools.product(edits, repeat=1), *itertools.product(edits, repeat=2)]
    plans = [hand_plan(*chosen) for chosen in lists]
    patched = [patch_model(hand_proto, plan).model for plan in plans]
    news = [refreshed_plan(plan) for plan in plans]
    wanted = [patch_model(hand_proto, new).model for new in news]

    def shape(model: onnx.ModelProto) -> object:
        nodes = {node.name: node.SerializeToString() for node in model.graph.node if node.name}
        tensors = {tensor.name: (tensor.data_type, *tensor.dims) for tensor in model.graph.initializer}
        return nodes, tensors

    def content(model: onnx.ModelProto) -> object:
        tensors = {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}
        return shape(model), tensors, metadata(model)

    shapes = [shape(model) for model in patched]
    taken = refused = 0
    for (old, before), (number, new) in itertools.product(enumerate(patched), enumerate(news)):
        if shapes[old] == shapes[number]:
            taken += 1
            assert content(refit_model(before, new)) == content(wanted[number])
        else:
            refused += 1
            with pytest.raises(InputError, match="patch the unsteered graph instead"):
                refit_model(before, new)
    assert taken == len(plans) + 2 * 5  # all pairs but one act in the same order however they are listed
    assert refused == len(plans) ** 2 - taken


def test_an_unsteered_graph_is_refused(hand_proto: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=r"holds no steering to refit; steer it with `patch`"):
        refit_model(hand_proto, hand_plan(ADD))


def test_other_edits_are_refused_by_name(steered_proto: onnx.ModelProto) -> None:
    elsewhere = dataclasses.replace(ADD, layer=2)
    with pytest.raises(
        InputError, match=r"plan has an edit 'sarsteer\.2\.block_output\.add\.0' that the gra"
    ):
        refit_model(steered_proto, hand_plan(ADD, PROJECT, elsewhere))
    with pytest.raises(
        InputError,
        match=r"graph holds an edit 'sarsteer\.1\.block_output\.project\.0' that the pl.* strength 0",
    ):
        refit_model(steered_proto, hand_plan(ADD))
    with pytest.raises(InputError, match=r"'sarsteer\.1\.block_output\.add\.1' .* has 2, the plan 3 edits"):
        refit_model(steered_proto, hand_plan(ADD, PROJECT, ADD))


def test_another_rank_is_refused(steered_proto: onnx.ModelProto) -> None:
    wider = dataclasses.replace(PROJECT, basis=random_basis(HAND_WIDTH, 5, seed=1))
    with pytest.raises(
        InputError, match=r"project\.0\.basis' has shape \(16, 4\) in the graph and \(16, 5\)"
    ):
        refit_model(steered_proto, hand_plan(ADD, wider))


def test_other_positions_are_refused(hand_proto: onnx.ModelProto) -> None:
    last = hand_plan(ADD)
    everywhere = hand_plan(dataclasses.replace(ADD, positions=Positions.ALL))
    for old, new, words in ((last, everywhere, "last .* all"), (everywhere, last, "all .* last")):
        before = patch_model(hand_proto, old).model
        pattern = "acts at {} positions in the graph and at {} in the plan".format(*words.split(" .* "))
        with pytest.raises(InputError, match=pattern):
            refit_model(before, new)


def test_a_mean_more_or_less_is_refused(hand_proto: onnx.ModelProto) -> None:
    without = dataclasses.replace(PROJECT, mean=None)
    with pytest.raises(InputError, match=r"the plan needs the constant '.*project\.0\.mean'"):
        refit_model(patch_model(hand_proto, hand_plan(without)).model, hand_plan(PROJECT))
    with pytest.raises(
        InputError, match=r"holds the constant '.*project\.0\.mean', for which the plan has no"
    ):
        refit_model(patch_model(hand_proto, hand_plan(PROJECT)).model, hand_plan(without))


def test_another_order_on_one_tensor_is_refused(steered_proto: onnx.ModelProto) -> None:
    """Names, shapes and types of the constants are the same; only the wiring tells."""
    with pytest.raises(InputError, match="edits of one tensor act in another order"):
        refit_model(steered_proto, hand_plan(PROJECT, ADD))


def test_a_plan_of_another_shape_of_model_is_refused(steered_proto: onnx.ModelProto) -> None:
    wide = SteeringPlan(HAND_WIDTH + 1, HAND_LAYERS, (Add(1, random_vector(HAND_WIDTH + 1, seed=0)),))
    deep = SteeringPlan(HAND_WIDTH, HAND_LAYERS + 1, (ADD, PROJECT))
    for plan, message in (
        (wide, "width 17; this decoder's width is 16"),
        (deep, "this decoder has 3 blocks"),
    ):
        for force in (False, True):
            with pytest.raises(InputError, match=message):
                refit_model(steered_proto, plan, force=force)


def test_a_plan_of_another_model_is_refused_unless_forced(steered_proto: onnx.ModelProto) -> None:
    helper.set_model_props(steered_proto, {FINGERPRINT_KEY: "ab" * 32})
    plan = dataclasses.replace(hand_plan(ADD, PROJECT), provenance={"model_fingerprint": "cd" * 32})
    with pytest.raises(InputError, match="made for another model"):
        refit_model(steered_proto, plan)
    assert metadata(refit_model(steered_proto, plan, force=True))[PLAN_KEY] == plan.digest()
    own = dataclasses.replace(plan, provenance={"model_fingerprint": "ab" * 32})
    assert metadata(refit_model(steered_proto, own))[FINGERPRINT_KEY] == "ab" * 32


def test_a_strength_that_overflows_the_stream_is_refused(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=torch.float16), tmp_path / "model.onnx")
    before = patch_model(proto, hand_plan(ADD)).model
    with pytest.raises(InputError, match="overflows the stream's float16"):
        refit_model(before, hand_plan(dataclasses.replace(ADD, strength=1e6)))


# --------------------------------------------------------------------------------- graphs altered after patching


def _external(model: onnx.ModelProto) -> None:
    tensor = constant(model, ".vector")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="data.bin")


def _folded(model: onnx.ModelProto) -> None:
    tensor = copy_of_tensor(constant(model, ".basis"))
    model.graph.initializer.remove(constant(model, ".basis"))
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def copy_of_tensor(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _retyped(model: onnx.ModelProto) -> None:
    tensor = constant(model, ".mean")
    values = numpy_helper.to_array(tensor).astype(np.float64)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _shared(model: onnx.ModelProto) -> None:
    reader = next(n for n in model.graph.node if n.op_type == "MatMul" and not n.name.startswith("sarsteer."))
    probe = helper.make_node(
        "Add", [reader.output[0], constant(model, ".mean").name], ["probed"], name="probe"
    )
    model.graph.node.append(probe)


def _renamed(model: onnx.ModelProto) -> None:
    node(model, ".centre").name = "Sub_17"


def _rewired(model: onnx.ModelProto) -> None:
    node(model, ".select").input[1] = node(model, ".select").input[2]


def _other_op(model: onnx.ModelProto) -> None:
    node(model, ".add").op_type = "Sub"


def _extra(model: onnx.ModelProto) -> None:
    reads = node(model, ".add").input[0]
    name = "sarsteer.1.block_output.add.0.more"
    model.graph.node.append(helper.make_node("Neg", [reads], ["more"], name=name))


def _attribute(model: onnx.ModelProto) -> None:
    node(model, ".centre").attribute.append(helper.make_attribute("axis", 1))


ALTERED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "external": (_external, r"constant '.*\.vector' lies in external data; expected it in the graph itself"),
    "folded": (_folded, r"needs the constant '.*\.basis', which is no initializer of the graph"),
    "retyped": (_retyped, r"constant '.*\.mean' is DOUBLE in the graph; expected float32"),
    "shared": (_shared, r"altered after patching.* Add 'probe' reads '.*\.mean'"),
    "renamed": (_renamed, r"altered after patching.* Sub 'Sub_17' reads"),
    "rewired": (_rewired, r"node '.*\.select' is Where\(.*\) -> .* in the graph and Where\("),
    "other operator": (_other_op, r"node '.*\.add' is Sub\(.*\) -> .* in the graph and Add\("),
    "another node": (_extra, r"holds Neg '.*\.more', which no edit has"),
    "an attribute": (_attribute, r"node '.*\.centre' is Sub\("),
}


@pytest.mark.parametrize(("alter", "message"), ALTERED.values(), ids=ALTERED)
def test_a_graph_altered_after_patching_is_refused(
    hand_proto: onnx.ModelProto, alter: Callable[[onnx.ModelProto], None], message: str
) -> None:
    add, project = ADD, dataclasses.replace(PROJECT, layer=0, positions=Positions.ALL)
    before = patch_model(hand_proto, hand_plan(add, project)).model
    new = refreshed_plan(hand_plan(add, project))
    assert metadata(refit_model(before, new))[PLAN_KEY] == new.digest()
    alter(before)
    with pytest.raises(InputError, match=f"(?s){message}.*patch the unsteered graph instead"):
        refit_model(before, new)


def test_a_constant_that_was_not_replaced_is_noticed(
    steered_proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is read back and compared with the plan by our own count."""
    new = refreshed_plan(hand_plan(ADD, PROJECT))
    replace = graph_passes.refit._with_constants

    def forgetful(model: onnx.ModelProto, *arguments: object) -> onnx.ModelProto:
        refitted = replace(model, *arguments)  # type: ignore[arg-type]
        constant(refitted, ".basis_scaled").CopyFrom(constant(model, ".basis_scaled"))
        return refitted

    monkeypatch.setattr(graph_passes.refit, "_with_constants", forgetful)
    with pytest.raises(GraphDamagedError, match=r"other values in '.*\.basis_scaled' than the plan's"):
        refit_model(steered_proto, new)

    def losing(model: onnx.ModelProto, *arguments: object) -> onnx.ModelProto:
        refitted = replace(model, *arguments)  # type: ignore[arg-type]
        refitted.graph.initializer.remove(constant(refitted, ".basis"))
        return refitted

    monkeypatch.setattr(graph_passes.refit, "_with_constants", losing)
    with pytest.raises(GraphDamagedError, match="set 5 constants; the plan has 6"):
        refit_model(steered_proto, new)
