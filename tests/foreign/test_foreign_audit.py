"""Foreign decoder graphs are audited: steered ones by their plan, whatever anything is called, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import helper

from calibration.plan import SteeringPlan
from graph_passes.audit import audit_model
from graph_passes.audit_report import AuditReport, Finding
from graph_passes.forms import Form
from graph_passes.graph_index import rename_reads
from graph_passes.insertion import InsertedEdit
from graph_passes.names import UNSTEERED_PREFIX
from graph_passes.onnx_file import read_graph
from graph_passes.patch import PatchResult, patch_model
from graph_passes.scopes import decoder_scopes
from tests.foreign.cases import CASES, ForeignGraph
from tests.foreign.catalogue import ALL, INPUT, LAST, NORM, OUTPUT, add, bias_plan, plan_of, project
from tests.graph_passes import attacks

PRESENT, MISSING, ALTERED, BYPASSED = Finding.PRESENT, Finding.MISSING, Finding.ALTERED, Finding.BYPASSED
Attack = Callable[[onnx.ModelProto], onnx.ModelProto]


def full_plan(foreign: ForeignGraph) -> SteeringPlan:
    """SARSteer's form, an addition at the last position behind every block, and whatever else an edit may be."""
    layers = int(foreign.model.config.num_hidden_layers)
    return plan_of(
        foreign,
        *(add(foreign, layer, OUTPUT, LAST) for layer in range(layers)),
        project(foreign, 1, INPUT, ALL),
        project(foreign, layers - 1, OUTPUT, LAST),
        add(foreign, 0, INPUT, LAST),
        add(foreign, layers - 1, NORM, ALL),
        project(foreign, layers - 1, NORM, LAST),
    )


@dataclass(frozen=True)
class Patched:
    """One file of a case, steered by a plan."""

    foreign: ForeignGraph
    plan: SteeringPlan
    unsteered: onnx.ModelProto
    result: PatchResult

    @property
    def model(self) -> onnx.ModelProto:
        return self.result.model

    def audit(self, model: onnx.ModelProto) -> AuditReport:
        return audit_model(model, self.plan, folder=self.foreign.folder)


@pytest.fixture(scope="module")
def patched(foreign: ForeignGraph) -> list[Patched]:
    """Every file of the case with either plan."""
    made = []
    for path in dict.fromkeys((foreign.prefill_path, foreign.decode_path)):
        graph = read_graph(path)
        for plan in (full_plan(foreign), bias_plan(foreign)):
            made.append(Patched(foreign, plan, graph, patch_model(graph, plan)))
    return made


@pytest.fixture(params=[False, True], ids=["named", "renamed"])
def hidden(request: pytest.FixtureRequest) -> Attack:
    return attacks.renamed if request.param else lambda model: model


def test_every_edit_of_a_steered_graph_is_present(patched: list[Patched], hidden: Attack) -> None:
    for each in patched:
        report = each.audit(hidden(each.model))
        assert report.passed, report.table()
        scopes = decoder_scopes(each.model)
        assert [edit.finding for edit in report.edits] == [PRESENT] * len(each.plan.edits) * len(scopes)


def test_every_edit_of_an_unsteered_graph_is_missing(patched: list[Patched], hidden: Attack) -> None:
    """And the model's own additions, biases and rounding are called nothing else."""
    for each in patched:
        report = each.audit(hidden(each.unsteered))
        assert {edit.finding for edit in report.edits} == {MISSING}
        assert report.unexpected == ()
        assert report.steps == ()


def test_an_edit_of_other_values_is_altered(patched: list[Patched], hidden: Attack) -> None:
    """One bit of one constant. In a bias, only its values tell an edit from what is the model's own."""
    for each in patched:
        for number in (1, len(each.plan.edits) - 1):
            edits = [edit for edit in each.result.edits if edit.number == number]
            on_bias = edits[0].form in (Form.NORM_BIAS, Form.PROJECTION_BIAS)
            name = next(name for name in edits[0].constants if name.endswith(("vector", "basis")))
            report = each.audit(hidden(attacks.one_bit(each.model, name)))
            for edit in report.edits:
                expected = MISSING if on_bias else ALTERED
                assert edit.finding is (expected if edit.number == number else PRESENT), report.table()


def test_readers_wired_past_an_edit_bypass_it(patched: list[Patched], hidden: Attack) -> None:
    """In one body of a merged decoder it is bypassed there alone."""
    for each in patched:
        if each.plan == bias_plan(each.foreign):
            continue  # nobody can read past a bias
        edit = each.result.edits[1]
        report = each.audit(hidden(_past(each.model, edit)))
        for found in report.edits:
            at_tensor = (found.layer, found.site) == (1, OUTPUT)
            expected = BYPASSED if at_tensor and found.scope == edit.scope else PRESENT
            assert found.finding is expected, report.table()


def _past(model: onnx.ModelProto, edit: InsertedEdit) -> onnx.ModelProto:
    """Whoever reads the tensor that an edit acts on reads it unsteered."""
    model = attacks.copied(model)
    scope = next(scope for scope in decoder_scopes(model) if str(scope) == edit.scope)
    for node in scope.graph(model).node:
        rename_reads(node, edit.anchor, UNSTEERED_PREFIX + edit.anchor)
    return model


def of(name: str) -> pytest.MarkDecorator:
    """Only one kind of graph."""
    cases = [case for case in CASES if case.name == name]
    return pytest.mark.parametrize("foreign", cases, ids=[name], indirect=True)


@of("transformers_lalm")
def test_an_output_of_the_graph_that_is_the_unsteered_norm(patched: list[Patched], hidden: Attack) -> None:
    """A graph without a head gives out its final norm, as steered by the edits there."""
    each = patched[0]
    output = each.model.graph.output[0].name
    assert output not in {name for node in each.model.graph.node for name in node.input}
    model = attacks.copied(each.model)
    last = next(node for node in model.graph.node if output in node.output)
    last.output[0] = "unread"
    model.graph.node.append(helper.make_node("Identity", [UNSTEERED_PREFIX + output], [output]))
    report = each.audit(hidden(model))
    assert [edit.finding for edit in report.edits if edit.site is NORM] == [BYPASSED, BYPASSED]


@of("qdq_static")
@pytest.mark.parametrize("rounded", ["before", "after"])
def test_an_addition_beside_a_quantised_sum(patched: list[Patched], hidden: Attack, rounded: str) -> None:
    """Behind a pair of Q/DQ that only the norm reads; or between attention's sum and the pair behind it."""
    each = patched[0]
    width = each.plan.hidden_size
    model = attacks.with_constant(each.model, "more", np.ones(width, dtype=np.float32))
    if rounded == "before":
        tensor = each.result.edits[1].anchor
        norm = {node.op_type for node in attacks.readers(model, tensor)} - {"Add"}
        model = attacks.with_constant(model, "scale", np.float32(0.1))
        nodes = [
            helper.make_node("QuantizeLinear", [tensor, "scale"], ["rounded"]),
            helper.make_node("DequantizeLinear", ["rounded", "scale"], ["again"]),
            helper.make_node("Add", ["again", "more"], ["behind"]),
        ]
        only = norm.pop()
    else:
        stream = {block.input for block in each.result.stream.blocks}
        tensor = next(
            node for node in model.graph.node if node.op_type == "Add" and stream & {*node.input}
        ).output[0]
        nodes, only = [helper.make_node("Add", [tensor, "more"], ["behind"])], None
    report = each.audit(hidden(attacks.inserted(model, tensor, nodes, only=only)))
    assert not report.passed
    if rounded == "before":
        assert [edit.finding for edit in report.edits if (edit.layer, edit.site) == (1, OUTPUT)] == [ALTERED]
    else:
        assert "stands inside block 0, where no edit can" in report.unexpected[0]
