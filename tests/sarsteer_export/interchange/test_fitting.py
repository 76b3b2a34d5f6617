"""What a format cannot hold is refused, or dropped where that was asked for, and said either way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from sarsteer_export.interchange import control_vector, steering_vectors, svec
from sarsteer_export.interchange.fitting import AllowedLosses, Holding, fit
from sarsteer_export.interchange.vectors import LayerVectors, plan_of

LAYERS, WIDTH = 6, 4
GGUF, PICKLED, SVEC = control_vector.HOLDING, steering_vectors.HOLDING, svec.HOLDING
OUTPUT, INPUT = Site.BLOCK_OUTPUT, Site.BLOCK_INPUT
FLOATS = st.floats(-8, 8, width=32)
VECTORS = arrays(np.float32, WIDTH, elements=FLOATS)
ADDS = st.builds(Add, st.integers(0, LAYERS - 1), VECTORS, FLOATS, st.sampled_from([OUTPUT, INPUT]))


def add(layer: int, value: float = 1.0, site: Site = OUTPUT, positions: Positions = Positions.ALL) -> Add:
    return Add(layer, np.full(WIDTH, value, np.float32), 0.5, site, positions)


def plan(*edits: Edit) -> SteeringPlan:
    return SteeringPlan(WIDTH, LAYERS, edits)


def boundary_sums(edits: tuple[Edit, ...]) -> dict[int, np.ndarray]:
    """What the edits add in all to the stream in front of each block, and behind the last: float64."""
    sums: dict[int, np.ndarray] = {}
    for edit in edits:
        assert isinstance(edit, Add)
        place = edit.layer + (edit.site is OUTPUT)
        sums[place] = sums.get(place, np.zeros(WIDTH)) + np.float64(np.float32(edit.strength)) * edit.vector
    return sums


@given(st.lists(ADDS, min_size=1, max_size=8), st.sampled_from([GGUF, PICKLED, SVEC]))
def test_a_round_trip_adds_the_same_to_every_tensor_of_the_stream(edits: list[Add], holding: Holding) -> None:
    original = plan(*edits)
    try:
        fitted = fit(
            original, holding, AllowedLosses(all_positions=True, drop_block_0=True, drop_last_block=True)
        )
    except UnsupportedError as error:
        assert "can hold none" in str(error)  # noqa: PT017
        return
    back = plan_of(
        LayerVectors("test", holding.site, fitted.by_layer),
        num_layers=LAYERS,
        strength=1.0,
        positions=Positions.ALL,
        provenance={},
    )
    first = holding.first + (holding.site is OUTPUT)
    last = LAYERS if holding.site is OUTPUT else LAYERS - 1
    wanted = {
        place: total for place, total in boundary_sums(original.edits).items() if first <= place <= last
    }
    found = boundary_sums(back.edits)
    assert found.keys() == wanted.keys()
    for place, total in wanted.items():
        # 8 products of at most 64 and their sum are rounded to float32: 9 x 512 x 2**-24 is 3e-4
        np.testing.assert_allclose(found[place], total, rtol=0, atol=3e-4)
    dropped = len(wanted) < len(boundary_sums(original.edits))
    assert any("dropped" in note for note in fitted.notes) == dropped


def test_one_edit_is_written_to_the_bit() -> None:
    fitted = fit(plan(add(3, 0.1)), GGUF, AllowedLosses())
    np.testing.assert_array_equal(
        fitted.by_layer[3], np.float32(0.5) * np.full(WIDTH, 0.1, np.float32), strict=True
    )
    assert fitted.notes == ()


@pytest.mark.parametrize(
    ("edit", "holding", "flag", "words"),
    [
        (add(0), GGUF, "drop_block_0", "add at block_output of block 0: its layers count from 1"),
        (add(1, site=INPUT), GGUF, "drop_block_0", "add at block_input of block 1"),
        (add(0, site=INPUT), PICKLED, "drop_block_0", "no block returns what block 0 reads"),
        (add(LAYERS - 1), SVEC, "drop_last_block", "no block reads what block 5 returns"),
    ],
)
def test_the_ends_that_a_format_lacks(edit: Add, holding: Holding, flag: str, words: str) -> None:
    whole = plan(add(2), edit)
    with pytest.raises(UnsupportedError, match=words) as refused:
        fit(whole, holding, AllowedLosses())
    assert f"--{flag.replace('_', '-')}" in str(refused.value)
    fitted = fit(whole, holding, AllowedLosses(**{flag: True}))
    assert len(fitted.by_layer) == 1
    assert any("dropped" in note and words.split(":")[0] in note for note in fitted.notes)
    with pytest.raises(UnsupportedError, match="can hold none of the plan's 1 edits"):
        fit(plan(edit), holding, AllowedLosses(**{flag: True}))


@pytest.mark.parametrize("holding", [GGUF, PICKLED, SVEC])
def test_other_positions_are_another_steering(holding: Holding) -> None:
    whole = plan(add(2, positions=Positions.LAST), add(3, positions=Positions.first(4)), add(4))
    with pytest.raises(
        UnsupportedError, match=r"2 edits of the plan act at first:4, last: .* --allow-all-positions"
    ):
        fit(whole, holding, AllowedLosses())
    fitted = fit(whole, holding, AllowedLosses(all_positions=True))
    note = fitted.notes[0]
    assert "what was written is another steering" in note
    assert ("pass min_token_index=None, token_indices=[-1] to its apply" in note) == (holding is PICKLED)


@pytest.mark.parametrize(
    "edit",
    [
        Project(2, np.eye(WIDTH, 1, dtype=np.float32), positions=Positions.ALL),
        add(LAYERS - 1, site=Site.FINAL_NORM_OUTPUT),
    ],
)
@pytest.mark.parametrize("holding", [GGUF, PICKLED, SVEC])
def test_what_is_no_vector_between_blocks_is_refused_whatever_is_allowed(
    edit: Edit, holding: Holding
) -> None:
    with pytest.raises(
        UnsupportedError, match=f"the plan has {edit.op} at {edit.site.value} of block {edit.layer}"
    ):
        fit(plan(add(1), edit), holding, AllowedLosses(True, True, True))


def test_every_edit_that_cannot_be_held_is_listed_up_to_a_number() -> None:
    edits = [Project(2, np.eye(WIDTH, 1, dtype=np.float32), strength=n) for n in range(8)]
    with pytest.raises(UnsupportedError, match=r"(project at block_output of block 2, ){5}.* and 2 more"):
        fit(plan(*edits), GGUF, AllowedLosses())


def test_edits_at_one_tensor_are_summed_and_said() -> None:
    fitted = fit(plan(add(2, 1.0), add(3, 2.0, INPUT)), GGUF, AllowedLosses())
    np.testing.assert_array_equal(fitted.by_layer[2], np.full(WIDTH, 1.5, np.float32), strict=True)
    assert any("layers 2 were summed" in note for note in fitted.notes)
    assert any(
        "add at block_input of block 3: written as what the neighbouring block returns" in n
        for n in fitted.notes
    )


def test_a_sum_beyond_float32_is_refused() -> None:
    huge = Add(2, np.full(WIDTH, 3e38, np.float32), positions=Positions.ALL)
    with pytest.raises(InputError, match="layer 2 sum to more than float32 holds"):
        fit(plan(huge, huge), GGUF, AllowedLosses())


def test_layers_count_from_the_end_too() -> None:
    vectors = LayerVectors("test", OUTPUT, {-1: np.ones(WIDTH, np.float32), 0: np.zeros(WIDTH, np.float32)})
    said = {"num_layers": LAYERS, "strength": 1.0, "positions": Positions.ALL, "provenance": {}}
    assert [edit.layer for edit in plan_of(vectors, **said).edits] == [0, LAYERS - 1]  # type: ignore[arg-type]
    twice = LayerVectors("test", OUTPUT, {-1: np.ones(WIDTH, np.float32), 5: np.zeros(WIDTH, np.float32)})
    with pytest.raises(InputError, match="named twice"):
        plan_of(twice, **said)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a vector for layer 5; a model of 3 blocks has 0 to 2"):
        plan_of(twice, **{**said, "num_layers": 3})  # type: ignore[arg-type]
