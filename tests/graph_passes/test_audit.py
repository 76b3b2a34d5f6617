"""A graph is steered by a plan, completely and unaltered, or the audit says at which edit it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from calibration.errors import InputError, SiteNotFoundError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from graph_passes.audit import audit_model
from graph_passes.audit_report import AuditReport, Finding
from graph_passes.forms import Form
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from graph_passes.selection import (
    POSITIONS_INPUT,
    STRENGTH_INPUT,
    LastFrom,
    PromptFrom,
    SteeringInputs,
    StrengthInput,
)
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, plan_of, random_basis, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.graph_passes import attacks
from tests.graph_passes.test_residual_stream import VARIANTS

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
KINDS = [(op, site, positions) for op in ("add", "project") for site, positions in SITES]
OTHER_POSITIONS = [Positions.PROMPT, Positions.GENERATED, Positions.range(1, 3)]
PRESENT, MISSING, ALTERED, BYPASSED = Finding.PRESENT, Finding.MISSING, Finding.ALTERED, Finding.BYPASSED

Attack = Callable[[onnx.ModelProto], onnx.ModelProto]


def edits_of_every_kind(*, width: int = WIDTH, layers: int = LAYERS) -> list[Edit]:
    return [
        one_edit(op, site, positions, width=width, layers=layers, layer=layer)
        for layer in range(layers)
        for op, site, positions in KINDS
    ]


def found(report: AuditReport) -> list[Finding]:
    return [edit.finding for edit in report.edits]


def assert_present(report: AuditReport, plan: SteeringPlan) -> None:
    assert report.passed, report.table()
    assert found(report) == [PRESENT] * len(plan.edits)
    assert report.unexpected == ()
    assert report.failures() == []


# ------------------------------------------------------------------------------------------------- what is present


def test_every_kind_of_edit_is_present_in_every_exporters_graph(any_decoder: TinyDecoder) -> None:
    plan = plan_of(*edits_of_every_kind())
    steered = patch_model(any_decoder.proto, plan).model
    folder = any_decoder.path.parent
    assert_present(audit_model(steered, plan, folder=folder), plan)
    assert_present(audit_model(attacks.renamed(steered), plan, folder=folder), plan)
    unsteered = audit_model(any_decoder.proto, plan, folder=folder)
    assert set(found(unsteered)) == {MISSING}


@pytest.mark.parametrize(("op", "site", "positions"), KINDS)
def test_one_edit_alone_is_present_in_its_cheapest_form(
    any_decoder: TinyDecoder, op: str, site: Site, positions: Positions
) -> None:
    plan = plan_of(one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=1))
    steered = patch_model(any_decoder.proto, plan).model
    assert_present(audit_model(attacks.renamed(steered), plan, folder=any_decoder.path.parent), plan)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_decoder_is_audited(variant: Variant, tmp_path: Path) -> None:
    _, proto = hand_decoder(variant, tmp_path / "model.onnx")
    edits = edits_of_every_kind(width=HAND_WIDTH, layers=HAND_LAYERS)
    for op in ("add", "project"):
        edits += [
            one_edit(op, Site.BLOCK_INPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
            for positions in OTHER_POSITIONS
        ]
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    last_from = LastFrom.ATTENTION_MASK if variant.mask else LastFrom.SEQUENCE
    for strength in (None, *StrengthInput):
        steered = patch_model(proto, plan, inputs=SteeringInputs(last_from, strength=strength)).model
        assert_present(audit_model(attacks.renamed(steered), plan), plan)


@pytest.mark.parametrize("opset", [13, 18])
def test_older_and_newer_opsets_are_audited(opset: int, tmp_path: Path) -> None:
    """At opset 13 a LayerNorm is written out, its bias a constant that is added where steering would be."""
    _, proto = hand_decoder(Variant(norm="layer"), tmp_path / "model.onnx", opset=opset)
    edits = edits_of_every_kind(width=HAND_WIDTH, layers=HAND_LAYERS)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    assert_present(audit_model(patch_model(proto, plan).model, plan), plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_audited(dtype: torch.dtype, tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    edits = edits_of_every_kind(width=HAND_WIDTH, layers=HAND_LAYERS)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    assert_present(audit_model(attacks.renamed(patch_model(proto, plan).model), plan), plan)


def test_positions_and_prompts_told_at_run_time_are_audited(exported_decoder: TinyDecoder) -> None:
    edits = [one_edit(op, Site.BLOCK_OUTPUT, positions, width=WIDTH, layers=LAYERS, layer=1)
             for op in ("add", "project") for positions in (Positions.LAST, Positions.first(2))]  # fmt: skip
    plan = plan_of(*edits)
    inputs = SteeringInputs(LastFrom.INPUT, PromptFrom.INPUT)
    steered = patch_model(exported_decoder.proto, plan, inputs=inputs).model
    assert_present(audit_model(attacks.renamed(steered), plan), plan)
    told = audit_model(steered, plan, last_from=LastFrom.ATTENTION_MASK)
    assert found(told) == [ALTERED, PRESENT, ALTERED, PRESENT]


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED"])
@pytest.mark.parametrize("name", ["pre-norm RMS", "LayerNorm with bias", "sandwich norm", "no mask"])
def test_a_graph_that_onnx_runtime_optimised_is_still_read(name: str, level: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    _, proto = hand_decoder(variant, tmp_path / "model.onnx")
    plan = SteeringPlan(
        HAND_WIDTH, HAND_LAYERS, tuple(edits_of_every_kind(width=HAND_WIDTH, layers=HAND_LAYERS))
    )
    last_from = LastFrom.ATTENTION_MASK if variant.mask else LastFrom.SEQUENCE
    steered = patch_model(proto, plan, inputs=SteeringInputs(last_from)).model
    optimised = attacks.optimised(steered, tmp_path, level)
    assert [node.name for node in optimised.graph.node] != [node.name for node in steered.graph.node]
    assert_present(audit_model(optimised, plan), plan)
    other = dataclasses.replace(
        plan, edits=(*plan.edits[:-1], dataclasses.replace(plan.edits[-1], strength=1.0))
    )
    assert found(audit_model(optimised, other)) == [PRESENT] * (len(plan.edits) - 1) + [ALTERED]


def test_an_edit_that_an_optimiser_folded_into_a_bias_is_not_called_present(tmp_path: Path) -> None:
    """`b + v` as one constant could be any bias: nobody can tell it from the model's own."""
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    plan = SteeringPlan(
        HAND_WIDTH, HAND_LAYERS, (Add(1, random_vector(16, seed=1), positions=Positions.ALL),)
    )
    result = patch_model(proto, plan)
    assert result.edits[0].form is Form.PROJECTION_BIAS
    assert_present(audit_model(attacks.renamed(result.model), plan), plan)
    (edit,) = audit_model(attacks.optimised(result.model, tmp_path, "BASIC"), plan).edits
    assert edit.finding is MISSING
    assert "folded into a bias" in edit.detail


def test_constants_are_read_from_external_data(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    edits = edits_of_every_kind(width=HAND_WIDTH, layers=HAND_LAYERS)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    steered = patch_model(proto, plan).model
    vector = attacks.initializer(steered, "sarsteer.0.block_input.add.0.vector").raw_data
    onnx.save(
        steered, tmp_path / "steered.onnx", save_as_external_data=True, location="data", size_threshold=0
    )
    outside = onnx.load(tmp_path / "steered.onnx", load_external_data=False)
    assert_present(audit_model(outside, plan, folder=tmp_path), plan)
    data = (tmp_path / "data").read_bytes()
    offset = data.find(vector)
    assert offset >= 0
    (tmp_path / "data").write_bytes(data[:offset] + b"\x01" + data[offset + 1 :])
    altered = audit_model(outside, plan, folder=tmp_path)
    assert found(altered).count(ALTERED) == 1
    assert set(found(audit_model(outside, plan))) == {ALTERED}  # where the data cannot be read


def test_the_plan_may_be_refitted_and_is_then_another(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(*edits_of_every_kind())
    steered = patch_model(exported_decoder.proto, plan).model
    other = plan_of(*(dataclasses.replace(edit, strength=edit.strength * 2) for edit in plan.edits))
    report = audit_model(steered, other)
    assert set(found(report)) == {ALTERED}
    assert f"steered by plan {plan.digest()[:12]}, not by {other.digest()[:12]}" in report.notes[0]


def test_strength_zero_is_an_edit_too(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(*(dataclasses.replace(edit, strength=0.0) for edit in edits_of_every_kind()))
    assert_present(audit_model(patch_model(exported_decoder.proto, plan).model, plan), plan)


# ----------------------------------------------------------------------------------------------------- the attacks

VECTOR = "sarsteer.{}.block_output.add.0.vector"


@dataclasses.dataclass(frozen=True)
class Steered:
    """A steered graph, whose plan it holds, and the tensors behind its blocks."""

    plan: SteeringPlan
    model: onnx.ModelProto
    outputs: tuple[str, ...]


def three_edits(positions: Positions = Positions.LAST) -> list[Edit]:
    return [
        Add(layer, random_vector(HAND_WIDTH, seed=layer), positions=positions) for layer in range(HAND_LAYERS)
    ]


def steer(
    folder: Path, edits: list[Edit], inputs: SteeringInputs | None = None, variant: Variant | None = None
) -> Steered:
    _, proto = hand_decoder(variant or Variant(norm="layer"), folder / "model.onnx")
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    outputs = tuple(block.output for block in find_residual_stream(proto).blocks)
    steered = patch_model(proto, plan, inputs=inputs or SteeringInputs()).model
    assert_present(audit_model(steered, plan), plan)
    return Steered(plan, steered, outputs)


@pytest.fixture
def steered(tmp_path: Path) -> Steered:
    return steer(tmp_path, three_edits())


@pytest.fixture(params=[False, True], ids=["named", "renamed"])
def hidden(request: pytest.FixtureRequest) -> Attack:
    """What an adversary does last: nothing, or other names for everything."""
    return attacks.renamed if request.param else lambda model: model


def audited(steered: Steered, model: onnx.ModelProto) -> AuditReport:
    report = audit_model(model, steered.plan)
    assert not report.passed
    assert report.failures()
    return report


def test_a_constant_altered_by_one_ulp(steered: Steered, hidden: Attack) -> None:
    report = audited(steered, hidden(attacks.one_ulp(steered.model, VECTOR.format(1))))
    assert found(report) == [PRESENT, ALTERED, PRESENT]
    assert "differ from the plan's by up to" in report.edits[1].detail


def test_a_constant_of_another_sign(steered: Steered, hidden: Attack) -> None:
    report = audited(steered, hidden(attacks.negated(steered.model, VECTOR.format(2))))
    assert found(report) == [PRESENT, PRESENT, ALTERED]


def test_vectors_swapped_between_layers(steered: Steered, hidden: Attack) -> None:
    report = audited(steered, hidden(attacks.swapped(steered.model, VECTOR.format(0), VECTOR.format(2))))
    assert found(report) == [ALTERED, PRESENT, ALTERED]
    assert report.edits[0].detail == "in its place stands edit 2"
    assert report.edits[2].detail == "in its place stands edit 0"


def test_an_edit_taken_out(steered: Steered, hidden: Attack) -> None:
    report = audited(steered, hidden(attacks.without_edit(steered.model, steered.outputs[1])))
    assert found(report) == [PRESENT, MISSING, PRESENT]
    assert report.edits[1].detail == "nothing stands at the output of block 1"


@pytest.mark.parametrize("reader", ["the norm", "the residual add", "everybody"])
@pytest.mark.parametrize("layer", range(HAND_LAYERS))
def test_readers_wired_past_an_edit(steered: Steered, hidden: Attack, reader: str, layer: int) -> None:
    tensor = steered.outputs[layer]
    operators = {node.op_type for node in attacks.readers(steered.model, tensor)}
    if reader == "the residual add" and "Add" not in operators:
        pytest.skip("no residual add reads the output of the last block")
    only = {"the norm": (operators - {"Add"}).pop(), "the residual add": "Add", "everybody": None}[reader]
    model = attacks.rewired(steered.model, tensor, f"sarsteer.unsteered.{tensor}", only=only)
    report = audited(steered, hidden(model))
    assert found(report) == [BYPASSED if at == layer else PRESENT for at in range(HAND_LAYERS)]
    assert report.unexpected == ()


def test_the_unsteered_tensor_as_an_output_of_the_graph(tmp_path: Path, hidden: Attack) -> None:
    steered = steer(tmp_path, three_edits())
    tensor = f"sarsteer.unsteered.{steered.outputs[1]}"
    model = attacks.copied(steered.model)
    model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    report = audited(steered, hidden(model))
    assert found(report) == [PRESENT, BYPASSED, PRESENT]
    assert "gives out the unsteered tensor" in report.edits[1].detail


def test_the_unsteered_tensor_computed_again_for_the_norm(steered: Steered, hidden: Attack) -> None:
    """Nobody reads the unsteered tensor itself: its sum is made a second time, with its operands in another order."""
    tensor = steered.outputs[1]
    total = next(n for n in steered.model.graph.node if f"sarsteer.unsteered.{tensor}" in n.output)
    again = helper.make_node("Add", list(total.input)[::-1], ["again"])
    model = attacks.with_node(steered.model, tensor, again)
    norm = next(n for n in attacks.readers(model, tensor) if n.op_type != "Add").op_type
    report = audited(steered, hidden(attacks.rewired(model, tensor, "again", only=norm)))
    assert found(report) == [PRESENT, BYPASSED, PRESENT]


@pytest.mark.parametrize("again", [False, True], ids=["read", "computed again"])
def test_a_cache_written_from_the_unsteered_tensor(steered: Steered, hidden: Attack, again: bool) -> None:
    """Attention reads the steered stream in this pass; later passes would read keys of the unsteered one."""
    model, tensor = attacks.copied(steered.model), steered.outputs[1]
    unsteered = f"sarsteer.unsteered.{tensor}"
    probe = helper.make_node("ReduceMean", ["copy" if again else unsteered], ["probe"], axes=[0, 1, 2])
    present = next(n for n in model.graph.node if "present.2.key" in n.output)
    present.output[0] = "honest_key"
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = "honest_key" if name == "present.2.key" else name
    position = list(model.graph.node).index(present) + 1
    forged = helper.make_node("Add", ["honest_key", "probe"], ["present.2.key"])
    model.graph.node.insert(position, forged)
    model.graph.node.insert(position, probe)
    if again:  # in another way, so that nothing but what it is computed from shows it
        first, second = next(n for n in model.graph.node if unsteered in n.output).input
        model.graph.node.insert(position, helper.make_node("Sub", [first, "negative"], ["copy"]))
        model.graph.node.insert(position, helper.make_node("Neg", [second], ["negative"]))
    report = audited(steered, hidden(model))
    assert found(report) == [PRESENT, BYPASSED, PRESENT]


def test_an_addition_that_cancels_the_edit(steered: Steered, hidden: Attack) -> None:
    opposite = -steered.plan.edits[1].tensors()["vector"]
    model = attacks.with_constant(steered.model, "opposite", opposite)
    select = next(n for n in model.graph.node if n.name == "sarsteer.1.block_output.add.0.select")
    where = helper.make_node("Where", [select.input[0], "opposite", select.input[2]], ["cancel"])
    cancel = helper.make_node("Add", [steered.outputs[1], "cancel"], ["behind"])
    model = attacks.inserted(model, steered.outputs[1], [where, cancel])
    report = audited(steered, hidden(model))
    assert found(report) == [PRESENT, ALTERED, PRESENT]
    assert "which no edit of the plan has" in report.edits[1].detail


def test_an_addition_that_cancels_the_edit_for_the_norm_alone(steered: Steered, hidden: Attack) -> None:
    tensor = steered.outputs[1]
    opposite = -steered.plan.edits[1].tensors()["vector"]
    model = attacks.with_constant(steered.model, "opposite", opposite)
    norm = next(n for n in attacks.readers(model, tensor) if n.op_type != "Add").op_type
    more = [helper.make_node("Add", [tensor, "opposite"], ["behind"])]
    report = audited(steered, hidden(attacks.inserted(model, tensor, more, only=norm)))
    assert found(report) == [PRESENT, ALTERED, PRESENT]


@pytest.mark.parametrize("op", ["Add", "Sub"])
@pytest.mark.parametrize("view", ["Cast", "Mul", "Unsqueeze"])
@pytest.mark.parametrize("only_norm", [False, True], ids=["for everybody", "for the norm"])
def test_an_addition_that_hides_behind_a_view(
    steered: Steered, hidden: Attack, view: str, op: str, only_norm: bool
) -> None:
    """The stream is cast, scaled by 1 or reshaped first; where reshaping cuts it, no decoder is found any more."""
    tensor = steered.outputs[1]
    vector = steered.plan.edits[1].tensors()["vector"]
    model = attacks.with_constant(steered.model, "opposite", -vector if op == "Add" else vector)
    model = attacks.with_constant(model, "one", np.ones((), dtype=np.float32))
    model = attacks.with_constant(model, "axis", np.array([3], dtype=np.int64))
    norm = next(n for n in attacks.readers(model, tensor) if n.op_type != "Add").op_type
    nodes = {
        "Cast": [helper.make_node("Cast", [tensor], ["view"], to=TensorProto.FLOAT)],
        "Mul": [helper.make_node("Mul", ["one", tensor], ["view"])],
        "Unsqueeze": [
            helper.make_node("Unsqueeze", [tensor, "axis"], ["viewed"]),
            helper.make_node("Squeeze", ["viewed", "axis"], ["view"]),
        ],
    }[view]
    nodes.append(helper.make_node(op, ["view", "opposite"], ["behind"]))
    model = attacks.inserted(model, tensor, nodes, only=norm if only_norm else None)
    if view == "Unsqueeze" and not only_norm:
        with pytest.raises(SiteNotFoundError):
            audit_model(hidden(model), steered.plan)
        return
    assert found(audited(steered, hidden(model))) == [PRESENT, ALTERED, PRESENT]


@pytest.mark.parametrize("only_norm", [False, True], ids=["for everybody", "for the norm"])
def test_an_addition_inside_a_block(steered: Steered, hidden: Attack, only_norm: bool) -> None:
    """Between attention and MLP there is no site; what cancels the edit of the block before stands there unseen."""
    attended = next(
        n.output[0] for n in steered.model.graph.node if n.op_type == "Add" and steered.outputs[1] in n.input
    )
    model = attacks.with_constant(steered.model, "opposite", -steered.plan.edits[1].tensors()["vector"])
    norm = next(n for n in attacks.readers(model, attended) if n.op_type != "Add").op_type
    more = [helper.make_node("Add", [attended, "opposite"], ["behind"])]
    model = attacks.inserted(model, attended, more, only=norm if only_norm else None)
    report = audited(steered, hidden(model))
    assert found(report) == [PRESENT] * 3
    assert "stands inside block 2, where no edit can" in report.unexpected[0]


def test_an_addition_that_depends_on_the_tokens(steered: Steered, hidden: Attack) -> None:
    """Neither a step nor a residual add: a vector that takes the edit back, scaled by what is always 1."""
    tensor = steered.outputs[1]
    model = attacks.with_constant(steered.model, "opposite", -steered.plan.edits[1].tensors()["vector"])
    norm = next(n for n in attacks.readers(model, tensor) if n.op_type != "Add").op_type
    always = [
        helper.make_node("Mul", [tensor, tensor], ["square"]),
        helper.make_node("Cos", ["square"], ["cosine"]),
        helper.make_node("Mul", ["cosine", "opposite"], ["change"]),
        helper.make_node("Add", [tensor, "change"], ["behind"]),
    ]
    model = attacks.inserted(model, tensor, always, only=norm)
    report = audited(steered, hidden(model))
    assert "an addition that is no residual add stands inside block 2" in report.unexpected[0]


def test_an_addition_of_another_domain_is_no_edit(steered: Steered, hidden: Attack) -> None:
    model = attacks.copied(steered.model)
    next(n for n in model.graph.node if n.name == "sarsteer.1.block_output.add.0.select").domain = "custom"
    assert found(audited(steered, hidden(model))) == [PRESENT, ALTERED, PRESENT]


def test_an_addition_where_no_edit_is(tmp_path: Path, hidden: Attack) -> None:
    steered = steer(tmp_path, three_edits()[:1])
    model = attacks.with_constant(steered.model, "more", random_vector(HAND_WIDTH, seed=9))
    node = helper.make_node("Add", [steered.outputs[1], "more"], ["behind"])
    report = audited(steered, hidden(attacks.inserted(model, steered.outputs[1], [node])))
    assert found(report) == [PRESENT]
    assert "stands at the output of block 1, which no edit of the plan has" in report.unexpected[0]


def test_a_mask_that_is_false_everywhere(steered: Steered, hidden: Attack) -> None:
    never = np.zeros((1, 1, 1), dtype=np.bool_)
    model = attacks.with_constant(steered.model, "never", never)
    report = audited(steered, hidden(attacks.rewired(model, "sarsteer.last.mask", "never")))
    assert found(report) == [ALTERED] * 3
    assert "its constants are the plan's; where or how strongly they act is not" in report.edits[0].detail


def test_a_mask_of_the_last_column(tmp_path: Path, hidden: Attack) -> None:
    """It does nothing for rows padded on the right, so it is accepted only when it is asked for."""
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(three_edits()))
    model = hidden(patch_model(proto, plan, inputs=SteeringInputs(LastFrom.SEQUENCE)).model)
    report = audit_model(model, plan)
    assert found(report) == [ALTERED] * 3
    assert "it acts at the last column" in report.edits[0].detail
    assert_present(audit_model(model, plan, last_from=LastFrom.SEQUENCE), plan)


def test_a_mask_read_from_another_input_of_the_same_kind(steered: Steered, hidden: Attack) -> None:
    model = attacks.copied(steered.model)
    model.graph.input.append(helper.make_tensor_value_info("other_mask", TensorProto.INT64, ["b", "t"]))
    window = next(n for n in model.graph.node if n.name == "sarsteer.pass.window")
    window.input[0] = "other_mask"
    assert found(audited(steered, hidden(model))) == [ALTERED] * 3


@pytest.mark.parametrize("strength", list(StrengthInput))
def test_a_strength_that_is_0_where_none_is_fed(
    strength: StrengthInput, tmp_path: Path, hidden: Attack
) -> None:
    steered = steer(tmp_path, three_edits(), SteeringInputs(strength=strength))
    zeros = np.zeros_like(numpy_helper.to_array(attacks.initializer(steered.model, STRENGTH_INPUT)))
    report = audited(steered, hidden(attacks.with_values(steered.model, STRENGTH_INPUT, zeros)))
    assert found(report) == [ALTERED] * 3
    assert f"where {STRENGTH_INPUT} is not fed, it is [0.0]" in report.edits[0].detail


def test_a_vector_that_may_be_fed_over(steered: Steered, hidden: Attack) -> None:
    """An initializer that is an input too is only a default."""
    model = attacks.copied(steered.model)
    name = VECTOR.format(1)
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [HAND_WIDTH]))
    assert found(audited(steered, hidden(model))) == [PRESENT, ALTERED, PRESENT]


def test_positions_that_have_a_default_are_none_that_a_caller_tells(tmp_path: Path, hidden: Attack) -> None:
    steered = steer(tmp_path, three_edits(), SteeringInputs(LastFrom.INPUT))
    model = attacks.with_constant(steered.model, POSITIONS_INPUT, np.array([-1], dtype=np.int64))
    assert found(audited(steered, hidden(model))) == [ALTERED] * 3


def test_edits_of_one_place_in_another_order(tmp_path: Path, hidden: Attack) -> None:
    add = Add(1, random_vector(HAND_WIDTH, seed=1), positions=Positions.ALL)
    project = Project(1, random_basis(HAND_WIDTH, 2, seed=1), positions=Positions.ALL)
    steered = steer(tmp_path, [add, project])
    backwards = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (project, add))
    report = audit_model(hidden(steered.model), backwards)
    assert not report.passed
    assert ALTERED in found(report)
    assert any("in another order" in edit.detail for edit in report.edits)


def test_a_basis_altered_by_one_ulp(tmp_path: Path, hidden: Attack) -> None:
    project = Project(1, random_basis(HAND_WIDTH, 2, seed=1), random_vector(HAND_WIDTH, seed=2))
    steered = steer(tmp_path, [project])
    for key in ("basis", "basis_scaled", "mean"):
        model = attacks.one_ulp(steered.model, f"sarsteer.1.block_output.project.0.{key}")
        assert found(audited(steered, hidden(model))) == [ALTERED]


@pytest.mark.parametrize("attack", ["dead", "ulp"])
def test_an_edit_in_a_bias_that_is_not_the_plans(tmp_path: Path, hidden: Attack, attack: str) -> None:
    steered = steer(tmp_path, three_edits(Positions.ALL))
    name = "sarsteer.1.block_output.add.0"
    assert f"{name}.bias" in {output for node in steered.model.graph.node for output in node.output}
    if attack == "ulp":
        model = attacks.one_ulp(steered.model, f"{name}.vector")
    else:
        bias = next(node for node in steered.model.graph.node if f"{name}.bias" in node.output).input[0]
        model = attacks.rewired(steered.model, f"{name}.bias", bias)
    assert found(audited(steered, hidden(model))) == [PRESENT, MISSING, PRESENT]


def test_the_unused_bias_of_a_fused_norm_altered(fused_decoder: TinyDecoder) -> None:
    edits = [Add(layer, random_vector(WIDTH, seed=layer), positions=Positions.ALL) for layer in range(LAYERS)]
    plan = plan_of(*edits)
    result = patch_model(fused_decoder.proto, plan)
    assert {edit.form for edit in result.edits} == {Form.NORM_BIAS}
    folder = fused_decoder.path.parent
    assert_present(audit_model(result.model, plan, folder=folder), plan)
    altered = audit_model(attacks.one_ulp(result.model, VECTOR.format(1)), plan, folder=folder)
    assert found(altered)[0] is found(altered)[2] is PRESENT
    assert found(altered)[1] in (ALTERED, MISSING)


def test_another_plan_and_a_plan_of_fewer_edits(steered: Steered, hidden: Attack) -> None:
    others = [Add(layer, random_vector(HAND_WIDTH, seed=layer + 40)) for layer in range(HAND_LAYERS)]
    other = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(others))
    assert found(audit_model(hidden(steered.model), other)) == [ALTERED] * 3
    fewer = dataclasses.replace(steered.plan, edits=steered.plan.edits[:2])
    report = audit_model(hidden(steered.model), fewer)
    assert found(report) == [PRESENT, PRESENT]
    assert not report.passed
    assert "stands at the output of block 2, which no edit of the plan has" in report.unexpected[0]
    moved = dataclasses.replace(
        steered.plan, edits=(*steered.plan.edits[:2], dataclasses.replace(others[0], layer=1))
    )
    assert not audit_model(hidden(steered.model), moved).passed


def test_a_plan_for_another_shape_is_refused(steered: Steered) -> None:
    with pytest.raises(InputError, match="the plan is for width 64"):
        audit_model(steered.model, plan_of(*edits_of_every_kind()))


def test_a_graph_that_is_no_decoder_is_refused(steered: Steered) -> None:
    node = helper.make_node("Relu", ["inputs_embeds"], ["logits"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["b", "s", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(SiteNotFoundError):
        audit_model(model, steered.plan)


def test_names_and_metadata_that_claim_steering_are_no_steering(steered: Steered) -> None:
    """Dead nodes and constants of the right names, in a graph whose stream nobody touched."""
    model = steered.model
    for tensor in steered.outputs:
        model = attacks.rewired(model, tensor, f"sarsteer.unsteered.{tensor}")
    report = audited(steered, model)
    assert set(found(report)) == {BYPASSED}
    assert report.notes[0] == f"the file says that it is steered by plan {steered.plan.digest()[:12]}"


# --------------------------------------------------------------------------------------- merged decoders, no plan


def merged(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The decoder as both bodies of an `If` on whether there is a past."""
    bodies = []
    for name in ("then_branch", "else_branch"):
        body = onnx.GraphProto(name=name)
        body.node.extend(proto.graph.node)
        body.output.extend(proto.graph.output)
        body.value_info.extend(proto.graph.value_info)
        for node in body.node:
            for names in (node.input, node.output):
                for at, tensor in enumerate(names):
                    if tensor and tensor not in {v.name for v in proto.graph.input} | {
                        t.name for t in proto.graph.initializer
                    }:
                        names[at] = f"{name}.{tensor}"
        for value in (*body.output, *body.value_info):
            value.name = f"{name}.{value.name}"
        bodies.append(body)
    branch = helper.make_node(
        "If", ["use_cache"], [v.name for v in proto.graph.output], name="merged",
        then_branch=bodies[0], else_branch=bodies[1],
    )  # fmt: skip
    model = attacks.copied(proto)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.append(branch)
    model.graph.input.append(helper.make_tensor_value_info("use_cache", TensorProto.BOOL, [1]))
    return model


def test_every_body_of_a_merged_decoder_must_hold_every_edit(tmp_path: Path, hidden: Attack) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(three_edits()))
    result = patch_model(merged(proto), plan)
    report = audit_model(hidden(result.model), plan)
    assert report.passed, report.table()
    assert [(edit.scope, edit.number) for edit in report.edits] == [
        (scope, number) for scope in ("else_branch", "then_branch") for number in range(3)
    ]
    model = attacks.copied(result.model)
    body = next(a.g for a in model.graph.node[-1].attribute if a.name == "else_branch")
    select = next(node for node in body.node if node.name == "sarsteer.1.block_output.add.0.select")
    select.input[1] = VECTOR.format(2)
    assert found(audit_model(hidden(model), plan)) == [PRESENT, ALTERED, PRESENT, PRESENT, PRESENT, PRESENT]


def test_without_a_plan_what_stands_on_the_stream_is_listed(steered: Steered, hidden: Attack) -> None:
    report = audit_model(hidden(steered.model))
    assert report.passed
    assert [step.place for step in report.steps] == [f"output of block {layer}" for layer in range(3)]
    norm = np.linalg.norm(steered.plan.edits[1].tensors()["vector"])
    assert report.steps[1].what.startswith(f"an addition of constants [16] of norm {norm:.4g}")


def test_without_a_plan_an_unsteered_graph_does_not_pass(tmp_path: Path) -> None:
    for variant in (Variant(), Variant(norm="layer"), Variant(tokens=True, norm="layer")):
        _, proto = hand_decoder(variant, tmp_path / "model.onnx", opset=13)
        report = audit_model(proto)
        assert report.steps == ()
        assert not report.passed
        assert report.failures() == ["no steering stands on the residual stream"]
