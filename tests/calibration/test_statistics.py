"""Statistics of states: whatever way they are split and merged, they are those of all states at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from calibration.directions import SteeringSettings, statistics_of, steering_plan, steering_vectors
from calibration.errors import InputError
from calibration.statistics import StateStatistics, added, read_parts, total, write_parts
from tests.calibration.test_directions import LAYERS, WIDTH, random_states

EXACT = 1e-10
"""Float64 sums in another order, of states of size 10: measured below 1e-13."""


def scatter(root_LKD: np.ndarray) -> np.ndarray:
    return np.einsum("lkd,lke->lde", root_LKD, root_LKD)


def literal_scatter(states_NLD: np.ndarray) -> np.ndarray:
    centred = states_NLD.astype(np.float64) - states_NLD.astype(np.float64).mean(axis=0)
    return np.einsum("nld,nle->lde", centred, centred)


def split(states: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return [part for part in np.split(states, sorted(cuts)) if len(part)]


@given(
    benign=st.integers(1, 130),
    cuts=st.lists(st.integers(0, 130), max_size=12),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 10.0]),
)
@settings(max_examples=40, deadline=None)
def test_merging_any_split_in_any_order_is_all_at_once(
    benign: int, cuts: list[int], seed: int, offset: float
) -> None:
    states = random_states(harmful=9, benign=benign, seed=seed % 1000)
    safe = states.benign_NLD + np.float32(offset)
    random = np.random.default_rng(seed)
    parts = [StateStatistics.of_benign(part) for part in split(safe, [cut % (benign + 1) for cut in cuts])]
    parts += [
        StateStatistics.of_pairs(harmful, refused)
        for harmful, refused in zip(
            split(states.harmful_NLD, [cut % 10 for cut in cuts]),
            split(states.refused_NLD, [cut % 10 for cut in cuts]),
            strict=True,
        )
    ]
    summed: tuple[StateStatistics, ...] = ()
    for index in random.permutation(len(parts)):
        summed = added(summed, parts[index])
    whole = total(summed)
    assert (whole.pairs, whole.benign) == (9, benign)
    exact = np.sum(states.refused_NLD.astype(np.float64) - states.harmful_NLD.astype(np.float64), axis=0)
    np.testing.assert_allclose(whole.refusal_sum_LD, exact, rtol=0, atol=EXACT)
    np.testing.assert_allclose(whole.benign_mean_LD, safe.astype(np.float64).mean(axis=0), rtol=0, atol=EXACT)
    np.testing.assert_allclose(
        scatter(whole.benign_root_LKD), literal_scatter(safe), rtol=0, atol=benign * EXACT
    )


def test_memory_does_not_grow_with_the_data() -> None:
    states = random_states(benign=20 * WIDTH)
    summed: tuple[StateStatistics, ...] = ()
    for batch in np.split(states.benign_NLD, 60):
        summed = added(summed, StateStatistics.of_benign(batch))
        assert all(part.benign_root_LKD.shape[1] < 2 * WIDTH for part in summed)
        assert len(summed) <= 7
    assert total(summed).nbytes < 8 * LAYERS * (2 * WIDTH + 2) * WIDTH


def test_a_root_has_no_more_rows_than_centred_states_have_directions() -> None:
    one_by_one: tuple[StateStatistics, ...] = ()
    for state in random_states(benign=9).benign_NLD:
        one_by_one = added(one_by_one, StateStatistics.of_benign(state[None]))
    assert total(one_by_one).benign_root_LKD.shape == (LAYERS, 8, WIDTH)


def test_vectors_from_statistics_are_those_from_states() -> None:
    states = random_states(benign=40)
    first, second = (
        statistics_of(
            type(states)(*(getattr(states, f"{name}_NLD")[rows] for name in ("harmful", "refused", "benign")))
        )
        for rows in (slice(None, 4), slice(4, None))
    )
    for rank in (0, 1, 7, WIDTH):
        wanted = steering_vectors(states, rank=rank, ablation=0.7)
        got = steering_vectors(first.merged(second), rank=rank, ablation=0.7)
        # float32 vectors of float64 sums: one rounding of values up to 4
        np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-7)


def test_one_object_serves_many_settings() -> None:
    states = random_states()
    found = statistics_of(states)
    for rank, alpha, layers in ((1, 0.1, None), (4, 2.0, (2, 0))):
        wanted = SteeringSettings(alpha=alpha, rank=rank, layers=layers)
        assert steering_plan(found, wanted) == steering_plan(states, wanted)


def test_statistics_of_other_sizes_do_not_merge() -> None:
    with pytest.raises(InputError, match="3 blocks of width 24 do not go with those of 2 blocks of width 24"):
        StateStatistics.empty(2, WIDTH).merged(StateStatistics.empty(LAYERS, WIDTH))


def test_nothing_added_is_no_statistics() -> None:
    with pytest.raises(ValueError, match="there are no statistics to merge"):
        total(())


# ------------------------------------------------------------------------------------------------------ file


def test_a_file_gives_back_the_same_numbers_and_provenance(tmp_path: Path) -> None:
    found = statistics_of(random_states())
    found.save(tmp_path / "s.safetensors", {"model": "x"})
    loaded, provenance = StateStatistics.load(tmp_path / "s.safetensors")
    assert provenance == {"model": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    settings = SteeringSettings(rank=3)
    assert steering_plan(loaded, settings).to_bytes() == steering_plan(found, settings).to_bytes()


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    parts = [statistics_of(random_states(seed=seed, benign=3 + seed)) for seed in range(3)]
    write_parts(tmp_path / "s", parts, {})
    found, _ = read_parts(tmp_path / "s")
    for got, wanted in zip(found, parts, strict=True):
        assert (got.pairs, got.benign) == (wanted.pairs, wanted.benign)
        np.testing.assert_array_equal(got.benign_root_LKD, wanted.benign_root_LKD)


def damaged(change: str, path: Path) -> None:
    found = statistics_of(random_states())
    tensors = {f"parts.0.{name}": getattr(found, name) for name in ("refusal_sum_LD", "benign_mean_LD")}
    tensors["parts.0.benign_root_LKD"] = found.benign_root_LKD
    header = {
        "format": "sarsteer-statistics",
        "version": 1,
        "parts": [{"pairs": 7, "benign": 9}],
        "provenance": {},
    }
    if change == "version":
        header["version"] = 2
    if change == "no parts":
        header["parts"] = []
    if change == "not finite":
        tensors["parts.0.refusal_sum_LD"] = np.full((LAYERS, WIDTH), np.nan)
    if change == "sizes":
        tensors["parts.0.benign_root_LKD"] = np.zeros((LAYERS, 2, WIDTH + 1))
    if change == "missing":
        del tensors["parts.0.benign_mean_LD"]
    save_file(tensors, path, {"sarsteer": json.dumps(header)} if change != "foreign" else {})


@pytest.mark.parametrize(
    "change", ["version", "no parts", "not finite", "sizes", "missing", "foreign", "bytes"]
)
def test_files_that_hold_no_statistics_are_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    damaged(change, path)
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=str(path)):
        StateStatistics.load(path)
