"""The checks behind every patch see damage: each is shown a graph that is wrong in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from calibration.errors import InputError, SiteNotFoundError
from calibration.plan import Positions, Site, SteeringPlan
from graph_passes.checks import GraphDamagedError, check_count, check_interface, check_wiring
from graph_passes.names import STEERED_PREFIX, UNSTEERED_PREFIX
from graph_passes.patch import PatchResult, patch_model
from graph_passes.scopes import Scope
from tests import tiny_lalm
from tests.conftest import one_edit, plan_of
from tests.decoders import TinyDecoder


@pytest.fixture
def plan() -> SteeringPlan:
    sites = (Site.BLOCK_INPUT, Site.BLOCK_OUTPUT)
    shape = {"width": tiny_lalm.WIDTH, "layers": tiny_lalm.LAYERS}
    return plan_of(
        *(one_edit("add", site, Positions.LAST, layer=layer, **shape) for layer, site in enumerate(sites))
    )


@pytest.fixture
def patched(exported_decoder: TinyDecoder, plan: SteeringPlan) -> PatchResult:
    return patch_model(exported_decoder.proto, plan)


def test_a_good_patch_passes_every_check(
    exported_decoder: TinyDecoder, patched: PatchResult, plan: SteeringPlan
) -> None:
    check_interface(exported_decoder.proto, patched.model)
    check_wiring(patched.model, patched.edits)
    check_count(plan, patched.edits, [Scope()])


def reread(model: onnx.ModelProto, old: str, new: str, *, only: int | None = None) -> None:
    """Make the project's consumers of `old` (or the `only`-th of them) read `new`."""
    readers = [n for n in model.graph.node if old in n.input and not n.name.startswith("sarsteer.")]
    assert readers
    for reader in readers if only is None else readers[only : only + 1]:
        reader.input[list(reader.input).index(old)] = new


def test_an_edit_that_nothing_reads_is_caught(patched: PatchResult) -> None:
    anchor = patched.edits[1].anchor
    reread(patched.model, anchor, "position_ids")
    with pytest.raises(GraphDamagedError, match=f"nothing reads the result '{anchor}' of edit 1"):
        check_wiring(patched.model, patched.edits)


def test_a_consumer_that_reads_past_an_edit_is_caught(patched: PatchResult) -> None:
    anchor = patched.edits[1].anchor
    reread(patched.model, anchor, UNSTEERED_PREFIX + anchor, only=0)
    with pytest.raises(GraphDamagedError, match=f"reads '{UNSTEERED_PREFIX}{anchor}', past edit 1"):
        check_wiring(patched.model, patched.edits)


def test_a_consumer_that_reads_past_an_edited_input_is_caught(patched: PatchResult) -> None:
    reread(patched.model, STEERED_PREFIX + "inputs_embeds", "inputs_embeds", only=0)
    with pytest.raises(GraphDamagedError, match="reads 'inputs_embeds', past edit 0"):
        check_wiring(patched.model, patched.edits)


def test_a_node_before_what_it_reads_is_caught(patched: PatchResult) -> None:
    nodes = list(patched.model.graph.node)
    del patched.model.graph.node[:]
    patched.model.graph.node.extend([nodes[-1], *nodes[:-1]])
    with pytest.raises(InputError, match="not in topological order"):
        check_wiring(patched.model, patched.edits)


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "renamed"


def retype_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


DAMAGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "inputs": retype_input,
    "outputs": rename_output,
    "opsets": lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
    "IR version": lambda model: setattr(model, "ir_version", model.ir_version - 1),
    "functions": lambda model: model.functions.append(onnx.FunctionProto(name="f")),
    "metadata": lambda model: setattr(model.metadata_props[0], "value", "changed"),
}


@pytest.mark.parametrize(("what", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_a_changed_interface_is_caught(
    patched: PatchResult, what: str, damage: Callable[[onnx.ModelProto], object]
) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(patched.model)
    check_interface(patched.model, changed)
    damage(changed)
    with pytest.raises(GraphDamagedError, match=f"patching changed the graph's {what}"):
        check_interface(patched.model, changed)


def test_a_lost_output_is_caught(patched: PatchResult) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(patched.model)
    del changed.graph.output[-1]
    with pytest.raises(GraphDamagedError, match="outputs"):
        check_interface(patched.model, changed)


def test_a_wrong_number_of_edits_is_caught(patched: PatchResult, plan: SteeringPlan) -> None:
    with pytest.raises(SiteNotFoundError, match=r"the plan has 2 edits; 1 were made: \[1\]"):
        check_count(plan, patched.edits[1:], [Scope()])
    twice = (patched.edits[0], dataclasses.replace(patched.edits[1], number=0))
    with pytest.raises(SiteNotFoundError, match=r"2 were made: \[0, 0\]"):
        check_count(plan, twice, [Scope()])
