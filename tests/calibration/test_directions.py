"""The calibration equations, against a literal float64 transcription and by their properties."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.directions import (
    SteeringSettings,
    ablate,
    refusal_direction,
    safe_basis,
    steering_plan,
    steering_vectors,
)
from calibration.errors import InputError
from calibration.plan import Add, Positions, Site
from calibration.states import CalibrationStates

LAYERS, WIDTH = 3, 24


def random_states(*, harmful: int = 7, benign: int = 9, seed: int = 0) -> CalibrationStates:
    random = np.random.default_rng(seed)
    base = random.standard_normal((harmful, LAYERS, WIDTH)).astype(np.float32)
    shift = random.standard_normal((LAYERS, WIDTH)) + 0.3 * random.standard_normal(base.shape)
    safe = random.standard_normal((benign, LAYERS, WIDTH)) * np.linspace(3, 0.2, WIDTH) + 1
    return CalibrationStates(base, (base + shift).astype(np.float32), safe.astype(np.float32))


def literal_vectors(states: CalibrationStates, *, rank: int, ablation: float) -> np.ndarray:
    """METHOD, calibration 1 to 3, word for word in float64."""
    vectors = []
    for layer in range(states.harmful_NLD.shape[1]):
        pairs = zip(states.refused_NLD[:, layer], states.harmful_NLD[:, layer], strict=True)
        v = np.mean([r.astype(np.float64) - h.astype(np.float64) for r, h in pairs], axis=0)
        H = states.benign_NLD[:, layer].astype(np.float64)
        U = np.linalg.svd((H - H.mean(axis=0)).T)[0][:, :rank]
        vectors.append(v - ablation * U @ (U.T @ v))
    return np.stack(vectors)


@pytest.mark.parametrize("ablation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [0, 1, 4, 8])
def test_vectors_follow_the_method(rank: int, ablation: float) -> None:
    states = random_states()
    vectors = steering_vectors(states, rank=rank, ablation=ablation)
    expected = literal_vectors(states, rank=rank, ablation=ablation)
    assert vectors.dtype == np.float32
    assert vectors.shape == (LAYERS, WIDTH)
    for got, wanted in zip(vectors.astype(np.float64), expected, strict=True):
        cosine = got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted)
        assert cosine >= 0.99999
        assert abs(np.linalg.norm(got) / np.linalg.norm(wanted) - 1) <= 1e-3


def test_vectors_are_not_normalised() -> None:
    states = random_states()
    doubled = dataclasses.replace(
        states, refused_NLD=states.harmful_NLD + 2 * (states.refused_NLD - states.harmful_NLD)
    )
    once = steering_vectors(states, rank=4, ablation=1.0)
    twice = steering_vectors(doubled, rank=4, ablation=1.0)
    np.testing.assert_allclose(
        twice, 2 * once, rtol=0, atol=2e-6
    )  # roundings of states of size 4: measured 2.4e-7


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_order_of_requests_does_not_matter(seed: int) -> None:
    states = random_states()
    random = np.random.default_rng(seed)
    pairs, benign = random.permutation(7), random.permutation(9)
    permuted = CalibrationStates(
        states.harmful_NLD[pairs], states.refused_NLD[pairs], states.benign_NLD[benign]
    )
    np.testing.assert_allclose(
        steering_vectors(permuted, rank=4, ablation=1.0),
        steering_vectors(states, rank=4, ablation=1.0),
        rtol=0,
        atol=3e-6,  # float32 sums in another order: measured 4e-7
    )


def test_pairing_does_not_matter_but_mixing_layers_does() -> None:
    states = random_states()
    crossed = dataclasses.replace(states, refused_NLD=states.refused_NLD[:, ::-1])
    assert not np.allclose(
        steering_vectors(crossed, rank=4, ablation=1.0),
        steering_vectors(states, rank=4, ablation=1.0),
        rtol=0,
        atol=0.1,
    )


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_swapping_plain_and_refused_negates_the_vectors(seed: int) -> None:
    states = random_states(seed=seed)
    swapped = CalibrationStates(states.refused_NLD, states.harmful_NLD, states.benign_NLD)
    np.testing.assert_array_equal(
        steering_vectors(swapped, rank=4, ablation=1.0), -steering_vectors(states, rank=4, ablation=1.0)
    )


def test_the_ablated_direction_is_orthogonal_to_the_safe_subspace_at_lambda_one() -> None:
    states = random_states()
    for layer in range(LAYERS):
        basis = safe_basis(states.benign_NLD[:, layer], 4)
        direction = refusal_direction(states.harmful_NLD[:, layer], states.refused_NLD[:, layer])
        assert basis.shape == (WIDTH, 4)
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), rtol=0, atol=1e-5)  # a float32 SVD
        assert np.abs(basis.T @ direction).max() > 0.05
        np.testing.assert_allclose(basis.T @ ablate(direction, basis, 1.0), 0, rtol=0, atol=1e-5)


def test_the_safe_subspace_is_of_centred_states() -> None:
    """A common offset of all benign states, however large, is no direction of the subspace."""
    random = np.random.default_rng(0)
    spread = np.zeros((6, WIDTH), dtype=np.float32)
    spread[:, 0] = random.standard_normal(6)
    offset = np.zeros(WIDTH, dtype=np.float32)
    offset[5] = 100
    basis = safe_basis(spread + offset, 1)
    np.testing.assert_allclose(np.abs(basis[:, 0]), np.eye(WIDTH)[0], rtol=0, atol=1e-6)


def test_rank_zero_leaves_the_refusal_direction_as_it_is() -> None:
    states = random_states()
    vectors = steering_vectors(states, rank=0, ablation=1.0)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(
            vectors[layer], refusal_direction(states.harmful_NLD[:, layer], states.refused_NLD[:, layer])
        )


def test_a_rank_that_benign_clips_cannot_span_is_clamped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    states = random_states(benign=5)
    with caplog.at_level(logging.WARNING):
        vectors = steering_vectors(states, rank=10, ablation=1.0)
    assert caplog.messages == ["rank 10 is more than 5 benign clips can span; using rank 4"]
    np.testing.assert_array_equal(vectors, steering_vectors(states, rank=4, ablation=1.0))
    assert len(caplog.messages) == 1


def test_a_rank_above_the_width_is_clamped(caplog: pytest.LogCaptureFixture) -> None:
    states = random_states(benign=WIDTH + 10)
    vectors = steering_vectors(states, rank=WIDTH + 5, ablation=1.0)
    assert f"using rank {WIDTH}" in caplog.text
    np.testing.assert_allclose(vectors, 0, rtol=0, atol=1e-5)  # the whole space was ablated


def test_a_basis_beyond_the_rank_of_its_states_is_refused() -> None:
    with pytest.raises(InputError, match="rank is 5; 5 centred benign states span at most 4"):
        safe_basis(random_states(benign=5).benign_NLD[:, 0], 5)


@pytest.mark.parametrize("name", ["harmful", "refused", "benign"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_refused(name: str, value: float) -> None:
    states = random_states()
    broken = getattr(states, f"{name}_NLD").copy()
    broken[1, 2, 3] = value
    with pytest.raises(InputError, match=f"hidden states over the {name} requests hold NaN or infinite"):
        steering_vectors(dataclasses.replace(states, **{f"{name}_NLD": broken}), rank=4, ablation=1.0)


# ------------------------------------------------------------------------------------------------------ plan


def test_the_plan_adds_every_vector_at_the_last_position_of_its_block_output() -> None:
    states = random_states()
    plan = steering_plan(states, SteeringSettings(alpha=0.2, rank=4), {"model": "x"})
    vectors = steering_vectors(states, rank=4, ablation=1.0)
    assert (plan.hidden_size, plan.num_layers, plan.provenance) == (WIDTH, LAYERS, {"model": "x"})
    assert len(plan.edits) == LAYERS
    for layer, edit in enumerate(plan.edits):
        assert isinstance(edit, Add)
        assert (edit.layer, edit.strength) == (layer, 0.2)
        assert edit.site is Site.BLOCK_OUTPUT
        assert edit.positions is Positions.LAST
        np.testing.assert_array_equal(edit.vector, vectors[layer])


def test_only_the_layers_asked_for_are_steered() -> None:
    plan = steering_plan(random_states(), SteeringSettings(rank=4, layers=(2, 0)))
    assert [edit.layer for edit in plan.edits] == [2, 0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), "layer 3 does not exist; expected 0 to 2"),
        ((-1,), "layer -1"),
        ((1, 1), "layer 1 is named twice"),
    ],
)
def test_layers_that_cannot_be_steered_are_refused(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        steering_plan(random_states(), SteeringSettings(rank=4, layers=layers))


def test_the_defaults_are_the_papers() -> None:
    assert SteeringSettings() == SteeringSettings(alpha=0.1, ablation=1.0, rank=10, layers=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"ablation": float("inf")}, "lambda is inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SteeringSettings(**wrong)  # type: ignore[arg-type]
