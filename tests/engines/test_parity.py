"""Parity can fail: every kind of wrong engine is caught, on traces small enough to read.

The oracle is made up: a script of a padded prefill and two decode steps, random logits, one stream tensor and
a cache, and an edit that moves every attended value by a few percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from engines.limits import Limits
from engines.parity import (
    CaseResult,
    Measurement,
    Pair,
    agreement,
    compare_case,
    judge_effects,
    measure_effects,
)
from engines.trace import LOGITS, Script, Trace, record
from tests.engines.graphs import WIDTH, decoder_graph

LIMITS = Limits(
    max_abs=1e-3,
    cosine=0.9999,
    kl=1e-4,
    top1=1.0,
    effect_cosine=0.999,
    effect_ratio=0.01,
    effect_floor=1e-4,
    source="made up for these tests",
)
BATCH, PREFILL, STEPS, VOCABULARY, STREAM = 2, 4, 2, 7, 5
HIDDEN = "layers.0/output"
MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=np.int64)
"""The first row is padded on the left."""


def script() -> Script:
    masks = [np.concatenate([MASK, np.ones((BATCH, step), np.int64)], axis=1) for step in range(STEPS + 1)]
    return Script("hand", tuple({"attention_mask": mask} for mask in masks), (PREFILL, *[1] * STEPS))


def random_trace(seed: int) -> Trace:
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    steps = tuple(
        {LOGITS: values(BATCH, sequence, VOCABULARY), HIDDEN: values(BATCH, sequence, STREAM)}
        for sequence in script().sequences
    )
    cache = {name: values(BATCH, 2, PREFILL + STEPS, 3) for name in ("present.0.key", "present.0.value")}
    return Trace(steps, cache)


def combined(one: Trace, other: Trace, scale: float) -> Trace:
    """One trace plus `scale` times another."""

    def add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: (a[name] + scale * b[name]).astype(np.float32) for name in a}

    steps = tuple(add(dict(a), dict(b)) for a, b in zip(one.steps, other.steps, strict=True))
    return Trace(steps, add(dict(one.cache), dict(other.cache)))


EDIT, OTHER_EDIT, NOISE = random_trace(1), random_trace(2), random_trace(3)
BASELINE = random_trace(0)
ORACLE = Pair(BASELINE, combined(BASELINE, EDIT, 0.05))
ENGINE = Pair(combined(BASELINE, NOISE, 1e-6), combined(ORACLE.edited, NOISE, 1e-6))
"""An engine as it should be: the oracle up to rounding."""
CONTROLS = [("unsteered", ENGINE.baseline), ("wrong sign", combined(ENGINE.baseline, EDIT, -0.05))]


def compare(engine: Pair = ENGINE, controls: list[tuple[str, Trace]] | None = None) -> CaseResult:
    return compare_case(script(), ORACLE, engine, LIMITS, CONTROLS if controls is None else controls)


def failed(result: CaseResult) -> set[str]:
    return {item.what for item in result.measurements if not item.passed}


def with_edited(edited: Trace) -> Pair:
    return Pair(ENGINE.baseline, edited)


def changed(trace: Trace, step: int, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Trace:
    """A trace with one output of one step replaced by what `change` makes of a copy of it."""
    steps = [dict(outputs) for outputs in trace.steps]
    steps[step][name] = change(steps[step][name].copy())
    return Trace(tuple(steps), trace.cache)


def put(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def test_an_engine_as_it_should_be_passes_and_every_figure_is_there() -> None:
    result = compare()
    assert result.passed
    assert [item.what for item in result.measurements] == [
        *["comparable", "logits max abs, relative", "logits cosine", "logits KL", "top-1 agreement"] * 1,
        *["KV max abs, relative", "KV cosine", "block max abs, relative", "block cosine"],
        *["comparable", "logits max abs, relative", "logits cosine", "logits KL", "top-1 agreement"],
        *["KV max abs, relative", "KV cosine", "block max abs, relative", "block cosine"],
        *["effect at the logits, relative", "logits effect cosine", "logits effect norm ratio − 1"],
        *["block effect cosine", "block effect norm ratio − 1"],
    ]
    assert [control.name for control in result.controls] == ["unsteered", "wrong sign"]
    assert all(control.caught_by for control in result.controls)
    assert len(result.logits_difference) == 1 + STEPS
    assert all(0 < value < 1e-4 for value in result.logits_difference)


@pytest.mark.parametrize("side", ["baseline", "edited"])
@pytest.mark.parametrize("step", [0, STEPS])
@pytest.mark.parametrize("name", [LOGITS, HIDDEN])
def test_one_wrong_number_at_an_attended_position_is_seen(side: str, step: int, name: str) -> None:
    trace = changed(getattr(ENGINE, side), step, name, put((1, 0, 2), 9.0))
    result = compare(dataclasses.replace(ENGINE, **{side: trace}))
    what = "logits" if name == LOGITS else "block"
    assert f"{what} max abs, relative" in failed(result)
    cases = {item.case for item in result.measurements if not item.passed}
    assert f"hand, {side}" in cases


@pytest.mark.parametrize("name", ["present.0.key", "present.0.value"])
def test_one_wrong_number_in_the_cache_is_seen(name: str) -> None:
    cache = dict(ENGINE.edited.cache)
    cache[name] = put((0, 1, 3, 2), 9.0)(cache[name].copy())
    assert failed(compare(with_edited(Trace(ENGINE.edited.steps, cache)))) == {
        "KV max abs, relative",
        "KV cosine",
    }


def test_what_is_computed_at_padding_is_nobody_s_business() -> None:
    edited = changed(changed(ENGINE.edited, 0, LOGITS, put((0, 0, 1), 99.0)), 0, HIDDEN, put((0, 0, 1), 99.0))
    cache = dict(edited.cache)
    cache["present.0.key"] = put((0, 1, 0, 2), 99.0)(cache["present.0.key"].copy())
    assert compare(with_edited(Trace(edited.steps, cache))).passed


def missing_output(trace: Trace) -> Trace:
    return Trace((*trace.steps[:-1], {LOGITS: trace.steps[-1][LOGITS]}), trace.cache)


def extra_output(trace: Trace) -> Trace:
    return Trace((trace.steps[0] | {"extra": trace.steps[0][LOGITS]}, *trace.steps[1:]), trace.cache)


def missing_cache(trace: Trace) -> Trace:
    return Trace(trace.steps, {"present.0.key": trace.cache["present.0.key"]})


def missing_step(trace: Trace) -> Trace:
    return Trace(trace.steps[:-1], trace.cache)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_output, [HIDDEN, "one side only"]),
        (extra_output, ["extra", "one side only"]),
        (missing_cache, ["present.0.value", "one side only"]),
        (missing_step, ["2 steps", "expected 3"]),
        (lambda trace: changed(trace, 0, LOGITS, lambda a: a[:, :-1]), ["(2, 3, 7)", "(2, 4, 7)"]),
        (lambda trace: changed(trace, 1, LOGITS, lambda a: a.astype(np.float16)), ["float16", "float32"]),
        (lambda trace: changed(trace, 1, HIDDEN, put((0, 0, 0), np.nan)), [HIDDEN, "NaN"]),
        (lambda trace: changed(trace, 1, HIDDEN, put((0, 0, 0), np.inf)), [HIDDEN, "infinite"]),
        (lambda trace: changed(trace, 0, LOGITS, put((0, 0, 0), np.nan)), [LOGITS, "NaN"]),
    ],
)
def test_traces_that_cannot_be_compared_fail_and_say_why(
    damage: Callable[[Trace], Trace], words: list[str]
) -> None:
    result = compare(with_edited(damage(ENGINE.edited)))
    assert not result.passed
    assert failed(result) == {"comparable"}
    (verdict,) = [item for item in result.measurements if not item.passed]
    for word in words:
        assert word in verdict.detail


def test_an_oracle_that_is_not_finite_proves_nothing() -> None:
    broken = changed(BASELINE, 0, LOGITS, put((1, 0, 0), np.nan))
    result = compare_case(script(), Pair(broken, ORACLE.edited), ENGINE, LIMITS, CONTROLS)
    assert failed(result) == {"comparable"}


WRONG_ENGINES = {
    "no edit": ENGINE.baseline,
    "wrong sign": combined(ENGINE.baseline, EDIT, -0.05),
    "another edit": combined(ENGINE.baseline, OTHER_EDIT, 0.05),
    "half the strength": combined(ENGINE.baseline, EDIT, 0.025),
    "a twentieth too strong": combined(ENGINE.baseline, EDIT, 0.0525),
}


@pytest.mark.parametrize("name", WRONG_ENGINES)
def test_a_wrong_edit_breaks_the_effect_even_where_no_absolute_limit_breaks(name: str) -> None:
    loose = dataclasses.replace(LIMITS, max_abs=10.0, cosine=-1.0, kl=100.0, top1=0.0)
    result = compare_case(script(), ORACLE, with_edited(WRONG_ENGINES[name]), loose, CONTROLS)
    assert not result.passed
    assert all("effect" in what for what in failed(result))
    assert compare_case(script(), ORACLE, ENGINE, loose, CONTROLS).passed


def test_an_edit_that_acts_in_the_prefill_alone_is_seen() -> None:
    edited = Trace((ENGINE.edited.steps[0], *ENGINE.baseline.steps[1:]), ENGINE.edited.cache)
    assert "logits effect cosine" in failed(compare(with_edited(edited)))


def test_an_edit_in_one_row_of_the_batch_alone_is_seen() -> None:
    steps = tuple(
        {name: np.stack([with_edit[name][0], without[name][1]]) for name in with_edit}
        for with_edit, without in zip(ENGINE.edited.steps, ENGINE.baseline.steps, strict=True)
    )
    assert "logits effect cosine" in failed(compare(with_edited(Trace(steps, ENGINE.edited.cache))))


def test_an_effect_too_small_to_be_told_from_rounding_is_no_proof() -> None:
    oracle = Pair(BASELINE, combined(BASELINE, EDIT, 1e-6))
    engine = Pair(BASELINE, combined(BASELINE, EDIT, 1e-6))
    effects = tuple(measure_effects(script(), oracle, engine))
    figures = judge_effects(script(), effects, LIMITS)
    assert [item.what for item in figures] == ["effect at the logits, relative"]
    assert not figures[0].passed
    assert figures[0].detail == f"{len(effects)} of {len(effects)} effects are below the floor and not judged"


def test_effects_are_measured_per_step_row_and_tensor_with_their_size() -> None:
    effects = list(measure_effects(script(), ORACLE, ENGINE))
    assert [(effect.step, effect.row, effect.tensor) for effect in effects] == [
        (step, row, name) for step in range(1 + STEPS) for name in (LOGITS, HIDDEN) for row in range(BATCH)
    ]
    first = effects[0]  # the first row's padded position does not count
    edit, stream = EDIT.steps[0][LOGITS][0, 1:], BASELINE.steps[0][LOGITS][0, 1:]
    wanted = 0.05 * np.linalg.norm(edit) / np.linalg.norm(stream)
    assert first.relative_norm == pytest.approx(wanted, rel=1e-3)
    assert (first.cosine, first.ratio) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-3))


def test_a_control_that_is_not_caught_fails_the_case() -> None:
    result = compare(controls=[*CONTROLS, ("harmless", ENGINE.edited)])
    assert not result.passed
    assert failed(result) == set(), "the engine itself is right"
    assert [control.name for control in result.controls if not control.passed] == ["harmless"]


def test_ties_in_the_best_token_are_no_disagreement_and_real_ones_are() -> None:
    def two_best(array: np.ndarray, gap: float, best: int) -> np.ndarray:
        array[1, 0] = np.linspace(-2, -1, VOCABULARY)
        array[1, 0, [2, 5]] = 3.0
        array[1, 0, best] += gap
        return array

    def top1(gap: float) -> Measurement:
        oracle = changed(BASELINE, 1, LOGITS, lambda a: two_best(a, gap, 2))
        engine = changed(BASELINE, 1, LOGITS, lambda a: two_best(a, gap, 5))
        figures = agreement("tie", script(), oracle, engine, LIMITS)
        return next(item for item in figures if item.what == "top-1 agreement")

    assert top1(1e-4).value == 1.0
    rows = int(MASK.sum()) + BATCH * STEPS
    assert top1(0.1).value == pytest.approx((rows - 1) / rows)
    assert not top1(0.1).passed


def test_kl_is_that_of_the_distributions() -> None:
    oracle = changed(BASELINE, 0, LOGITS, lambda a: a * 2)
    figures = agreement("kl", script(), oracle, BASELINE, LIMITS)
    p, q = (np.exp(t.steps[0][LOGITS].astype(np.float64)) for t in (oracle, BASELINE))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    wanted = (p * np.log(p / q)).sum(-1)[MASK != 0].max()
    assert next(item for item in figures if item.what == "logits KL").value == pytest.approx(wanted)


def test_at_strength_zero_the_engine_must_equal_itself_to_the_bit() -> None:
    oracle = Pair(BASELINE, BASELINE)
    same = Pair(ENGINE.baseline, ENGINE.baseline)
    passed = compare_case(script(), oracle, same, LIMITS, [], expect_effect=False)
    assert passed.passed
    assert passed.measurements[-1].what == "bit-equal at strength 0"
    value = np.nextafter(ENGINE.baseline.steps[1][HIDDEN][0, 0, 0], np.float32(9))
    for edited in (
        changed(ENGINE.baseline, 1, HIDDEN, put((0, 0, 0), float(value))),
        Trace(
            ENGINE.baseline.steps,
            {name: combined(ENGINE.baseline, NOISE, 1e-6).cache[name] for name in ENGINE.baseline.cache},
        ),
    ):
        result = compare_case(script(), oracle, with_edited(edited), LIMITS, [], expect_effect=False)
        assert failed(result) == {"bit-equal at strength 0"}


@pytest.mark.parametrize(("factor", "judged"), [(0.99, False), (1.01, True)])
def test_effects_are_judged_from_the_floor_on(factor: float, judged: bool) -> None:
    wrong = Pair(ENGINE.baseline, combined(ENGINE.baseline, OTHER_EDIT, 0.05))
    effects = list(measure_effects(script(), ORACLE, wrong))
    loudest = max(effect.relative_norm for effect in effects)
    figures = judge_effects(script(), effects, dataclasses.replace(LIMITS, effect_floor=loudest / factor))
    assert any("cosine" in item.what for item in figures) is judged
    not_judged = sum(effect.relative_norm < loudest / factor for effect in effects)
    assert figures[0].detail.startswith(f"{not_judged} of {len(effects)} effects are below the floor")


def test_parity_without_controls_is_refused() -> None:
    with pytest.raises(ValueError, match="without negative controls proves nothing"):
        compare(controls=[])


@pytest.mark.parametrize("at_least", [True, False])
def test_nan_never_keeps_a_limit(at_least: bool) -> None:
    assert not Measurement("case", "figure", float("nan"), 0.5, at_least).passed
    assert Measurement("case", "figure", 0.5, 0.5, at_least).passed
    assert Measurement("case", "figure", 0.6, 0.5, at_least).passed is at_least


def test_without_stream_tensors_no_figure_of_blocks_is_made_up() -> None:
    def bare(trace: Trace) -> Trace:
        return Trace(tuple({LOGITS: step[LOGITS]} for step in trace.steps), trace.cache)

    pairs = [Pair(bare(pair.baseline), bare(pair.edited)) for pair in (ORACLE, ENGINE)]
    controls = [(name, bare(trace)) for name, trace in CONTROLS]
    result = compare_case(script(), *pairs, LIMITS, controls)
    assert result.passed
    assert not [item.what for item in result.measurements if "block" in item.what]


def test_a_script_is_recorded_with_the_cache_carried_and_nothing_left_from_before() -> None:
    from engines.onnxruntime_runner import OnnxRuntimeDecoder

    random = np.random.default_rng(5)
    steps = tuple(
        {"inputs_embeds": random.standard_normal((1, sequence, WIDTH)).astype(np.float32)}
        for sequence in (3, 1, 1)
    )
    with OnnxRuntimeDecoder(decoder_graph().SerializeToString()) as runner:
        first = record(runner, Script("hand", steps, (3, 1, 1)))
        again = record(runner, Script("hand", steps, (3, 1, 1)))
    whole = np.concatenate([step["inputs_embeds"] for step in steps], axis=1)
    np.testing.assert_array_equal(first.cache["present.0.key"][:, 0], whole)
    assert [sorted(step) for step in first.steps] == [["logits"]] * 3
    for one, other in zip(first.steps, again.steps, strict=True):
        np.testing.assert_array_equal(one["logits"], other["logits"])
