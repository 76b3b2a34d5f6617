"""Every kind of decoder graph, steered, does what its PyTorch model does, steered by hooks.

Compared are logits, keys and values of attended tokens and the effect on logits, in prefill and in a decode step from
the caches it left, under every padding that the graph supports. `docs/decoders.md` holds the table.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from calibration.plan import SteeringPlan
from graph_passes.forms import Form
from graph_passes.patch import patch_model
from graph_passes.scopes import decoder_scopes
from graph_passes.unpatch import unpatch_model
from tests.foreign.cases import ForeignGraph
from tests.foreign.catalogue import (
    ALL_CASES,
    BEGIN,
    END,
    TABLE,
    Bench,
    bias_plan,
    controls,
    last_plan,
    limits_of,
    mixed_plan,
    plans,
    row,
    table,
)

pytestmark = pytest.mark.parametrize("foreign", ALL_CASES, ids=lambda case: case.name, indirect=True)

MIXED_FORMS = [
    Form.ADD,
    Form.SELECTED_ADD,
    Form.PROJECTION,
    Form.GATHERED_PROJECTION,
    Form.SELECTED_ADD,
    Form.PROJECTION,
    Form.ADD,
    Form.GATHERED_PROJECTION,
]
LEAST_EFFECT = 1.0
"""What steering changes in the logits of a pass, as a norm; measured at least 1.9."""


@pytest.fixture(scope="session")
def bench(foreign: ForeignGraph) -> Bench:
    """The graph, and what it and its model answer unsteered."""
    return Bench(foreign)


def test_every_edit_acts_as_in_the_steered_model(bench: Bench) -> None:
    for name, plan in plans(bench.foreign).items():
        figures = bench.compare(bench.steer(plan).sessions, bench.oracle(plan))
        assert figures.within(limits_of(bench.case)), (name, figures)
        assert figures.effect > LEAST_EFFECT, name


def test_other_steering_and_none_are_told_apart(bench: Bench) -> None:
    """The comparison fails for an unsteered graph, and for a model steered otherwise: all else is equal."""
    plan = last_plan(bench.foreign)
    limits = limits_of(bench.case)
    assert not bench.compare(bench.foreign.sessions, bench.oracle(plan)).within(limits)
    sessions = bench.steer(plan).sessions
    others = controls(bench.foreign)
    assert others.keys() == {"sign", "layer", "positions"}
    for name, other in others.items():
        figures = bench.compare(sessions, bench.oracle(other))
        assert figures.cosine < limits.cosine, name
        assert not dataclasses.replace(figures, cosine=1.0).within(limits), name


def test_edits_take_the_cheapest_form_and_stand_in_every_scope(bench: Bench) -> None:
    for graph in bench.graphs:
        scopes = [str(scope) for scope in decoder_scopes(graph)]
        assert len(scopes) == (2 if bench.case.name == "optimum_merged" else 1)
        edits = patch_model(graph, mixed_plan(bench.foreign)).edits
        for scope in scopes:
            assert [edit.form for edit in edits if edit.scope == scope] == MIXED_FORMS
        alone = {edit.form for edit in patch_model(graph, bias_plan(bench.foreign)).edits}
        assert len(alone) == 1
        assert alone <= {Form.ADD, Form.NORM_BIAS, Form.PROJECTION_BIAS}


def test_strength_zero_is_exact_to_the_bit(bench: Bench) -> None:
    edits = [
        dataclasses.replace(edit, strength=0.0)
        for plan in (mixed_plan(bench.foreign), bias_plan(bench.foreign))
        for edit in plan.edits
    ]
    widths = bench.foreign.model.config.hidden_size, bench.foreign.model.config.num_hidden_layers
    for plan in (SteeringPlan(*widths, tuple(edits)), SteeringPlan(*widths, tuple(edits[-2:]))):
        sessions = bench.steer(plan).sessions
        for padding in bench.case.paddings:
            before, after = bench.plain[padding][0], bench.by_graph(sessions, padding)
            for (_, plain), (_, steered) in zip(before, after, strict=True):
                arrays = zip(
                    (plain.logits, *plain.presents), (steered.logits, *steered.presents), strict=True
                )
                for one, other in arrays:
                    assert one.dtype == other.dtype
                    assert np.isfinite(one).all()
                    assert one.tobytes() == other.tobytes()


def test_unpatch_gives_back_the_graph(bench: Bench) -> None:
    for graph in bench.graphs:
        for plan in plans(bench.foreign).values():
            steered = patch_model(graph, plan).model
            assert steered != graph
            original = unpatch_model(steered)
            assert original == graph
            assert original.SerializeToString(deterministic=True) == graph.SerializeToString(
                deterministic=True
            )


def test_the_table_in_the_documents_says_what_was_found(bench: Bench) -> None:
    document = TABLE.read_text(encoding="utf-8")
    held = BEGIN + document.partition(BEGIN)[2].partition(END)[0] + END
    lines = held.splitlines()[3:-1]
    assert [line.split("`")[1] for line in lines] == [case.name for case in ALL_CASES]
    assert row(bench) in lines
    assert held == table(lines)
