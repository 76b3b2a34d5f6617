"""Does an engine do what the oracle does? Agreement, the effect of an edit, and controls that must fail.

At a small strength an engine with no edit at all passes every absolute limit. The decisive check is the
effect: the difference that the edit makes, engine against oracle. Everything is compared at attended
positions; what a graph computes at padding is nobody's business.

Dimensions: B batch, S sequence of a step, T past and present, D width, V vocabulary, N attended rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.trace import LOGITS, Script, Trace, comparable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from engines.limits import Limits


@dataclass(frozen=True)
class Measurement:
    """One figure against its limit; `at_least` says on which side of the limit it must lie."""

    case: str
    what: str
    value: float
    limit: float
    at_least: bool
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its limit. NaN never does."""
        return bool(self.value >= self.limit if self.at_least else self.value <= self.limit)


@dataclass(frozen=True)
class Pair:
    """One side of a comparison: traces of the same script without and with the edit."""

    baseline: Trace
    edited: Trace


@dataclass(frozen=True)
class Effect:
    """The effect of the edit in one tensor of one step and row, engine against oracle."""

    step: int
    row: int
    tensor: str
    cosine: float
    ratio: float
    relative_norm: float


@dataclass(frozen=True)
class Control:
    """An engine that is wrong on purpose, and the figures that gave it away."""

    name: str
    caught_by: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """A control passes when it is caught."""
        return bool(self.caught_by)


@dataclass(frozen=True)
class CaseResult:
    """All figures of one script: agreement without and with the edit, the effect, the controls."""

    case: str
    measurements: tuple[Measurement, ...]
    effects: tuple[Effect, ...]
    controls: tuple[Control, ...]
    logits_difference: tuple[float, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every figure keeps its limit and every control was caught."""
        figures = all(item.passed for item in self.measurements)
        return figures and all(control.passed for control in self.controls)


def compare_case(
    script: Script,
    oracle: Pair,
    engine: Pair,
    limits: Limits,
    controls: Sequence[tuple[str, Trace]],
    *,
    expect_effect: bool = True,
) -> CaseResult:
    """Compare an engine with the oracle on one script.

    `controls`: traces of engines that are wrong on purpose, by name; each must break a limit. Without
    `expect_effect` (an edit of strength 0) the edited engine must equal its baseline bit for bit instead.
    """
    measurements = [
        *agreement(f"{script.name}, baseline", script, oracle.baseline, engine.baseline, limits),
        *agreement(f"{script.name}, edited", script, oracle.edited, engine.edited, limits),
    ]
    if not all(item.passed for item in measurements if item.what == "comparable"):
        return CaseResult(script.name, tuple(measurements), (), ())
    if not expect_effect:
        measurements.append(_bit_equality(script, engine))
        return CaseResult(script.name, tuple(measurements), (), (), _differences(script, oracle, engine))
    if not controls:
        raise ValueError("parity without negative controls proves nothing; pass at least one")
    effects = tuple(measure_effects(script, oracle, engine))
    measurements += judge_effects(script, effects, limits)
    caught = []
    for name, trace in controls:
        wrong = Pair(engine.baseline, trace)
        figures = agreement(f"{script.name}, {name}", script, oracle.edited, trace, limits)
        figures += judge_effects(script, tuple(measure_effects(script, oracle, wrong)), limits)
        caught.append(Control(name, tuple(item.what for item in figures if not item.passed)))
    return CaseResult(
        script.name, tuple(measurements), effects, tuple(caught), _differences(script, oracle, engine)
    )


def agreement(case: str, script: Script, oracle: Trace, engine: Trace, limits: Limits) -> list[Measurement]:
    """Absolute agreement of two traces: logits, stream tensors and cache at attended positions."""
    problem = comparable(oracle, engine)
    verdict = Measurement(
        case, "comparable", float(problem is None), 1.0, at_least=True, detail=problem or ""
    )
    if problem is not None:
        return [verdict]
    worst = {"max_abs": 0.0, "cosine": 1.0}
    stream, cache = dict(worst), dict(worst)
    logits = dict(worst) | {"kl": 0.0, "top1": 0.0}
    rows = ties = 0
    for step, (wanted, seen) in enumerate(zip(oracle.steps, engine.steps, strict=True)):
        attended_BS = script.attended(step)
        for name, expected in wanted.items():
            expected_N, actual_N = expected[attended_BS], seen[name][attended_BS]
            _keep_worst(logits if name == LOGITS else stream, expected_N, actual_N)
            if name == LOGITS:
                logits["kl"] = max(logits["kl"], float(_kl(expected_N, actual_N).max()))
                agrees_N = _top1_agrees(expected_N, actual_N, limits.max_abs)
                logits["top1"] += float(agrees_N.sum())
                ties += int((agrees_N & (expected_N.argmax(axis=-1) != actual_N.argmax(axis=-1))).sum())
                rows += len(expected_N)
    for name, expected in oracle.cache.items():
        attended_BT = script.attended_cache()
        _keep_worst(
            cache, expected.swapaxes(1, 2)[attended_BT], engine.cache[name].swapaxes(1, 2)[attended_BT]
        )
    figures = [
        verdict,
        Measurement(case, "logits max abs, relative", logits["max_abs"], limits.max_abs, at_least=False),
        Measurement(case, "logits cosine", logits["cosine"], limits.cosine, at_least=True),
        Measurement(case, "logits KL", logits["kl"], limits.kl, at_least=False),
        Measurement(
            case,
            "top-1 agreement",
            logits["top1"] / rows,
            limits.top1,
            True,
            f"{ties} of {rows} rows are ties",
        ),
        Measurement(case, "KV max abs, relative", cache["max_abs"], limits.max_abs, at_least=False),
        Measurement(case, "KV cosine", cache["cosine"], limits.cosine, at_least=True),
    ]
    if any(name != LOGITS for name in oracle.steps[0]):
        figures += [
            Measurement(case, "block max abs, relative", stream["max_abs"], limits.max_abs, at_least=False),
            Measurement(case, "block cosine", stream["cosine"], limits.cosine, at_least=True),
        ]
    return figures


def measure_effects(script: Script, oracle: Pair, engine: Pair) -> Iterator[Effect]:
    """The effect (edited − baseline) in every tensor of every step and row, engine against oracle."""
    for step in range(len(script.steps)):
        attended_BS = script.attended(step)
        for name in oracle.edited.steps[step]:
            wanted = _difference(oracle, step, name)
            seen = _difference(engine, step, name)
            for row, attended_S in enumerate(attended_BS):
                if not attended_S.any():
                    continue
                expected, actual = wanted[row, attended_S].ravel(), seen[row, attended_S].ravel()
                scale = np.linalg.norm(oracle.baseline.steps[step][name][row, attended_S].astype(np.float64))
                norm, other = np.linalg.norm(expected), np.linalg.norm(actual)
                yield Effect(
                    step=step,
                    row=row,
                    tensor=name,
                    cosine=float(expected @ actual / (norm * other))
                    if norm and other
                    else float(norm == other),
                    ratio=float(other / norm) if norm else float(1.0 if other == 0 else np.inf),
                    relative_norm=float(max(norm, other) / scale) if scale else 0.0,
                )


def judge_effects(script: Script, effects: Sequence[Effect], limits: Limits) -> list[Measurement]:
    """The worst effect figures of a script against their limits.

    Effects below the floor of `limits` on both sides cannot be told from rounding and are not judged; that the
    logits show an effect that can is a figure of its own.
    """
    case = f"{script.name}, effect"
    audible = [effect for effect in effects if effect.relative_norm >= limits.effect_floor]
    at_logits = [effect.relative_norm for effect in effects if effect.tensor == LOGITS]
    detail = f"{len(effects) - len(audible)} of {len(effects)} effects are below the floor and not judged"
    figures = [
        Measurement(
            case, "effect at the logits, relative", max(at_logits), limits.effect_floor, True, detail
        ),
    ]
    for what, chosen in (
        ("logits", [effect for effect in audible if effect.tensor == LOGITS]),
        ("block", [effect for effect in audible if effect.tensor != LOGITS]),
    ):
        if chosen:
            cosine = min(effect.cosine for effect in chosen)
            ratio = max(abs(effect.ratio - 1) for effect in chosen)
            figures += [
                Measurement(case, f"{what} effect cosine", cosine, limits.effect_cosine, at_least=True),
                Measurement(
                    case, f"{what} effect norm ratio − 1", ratio, limits.effect_ratio, at_least=False
                ),
            ]
    return figures


def _difference(pair: Pair, step: int, name: str) -> NDArray[np.float64]:
    edited, baseline = pair.edited.steps[step][name], pair.baseline.steps[step][name]
    return np.asarray(edited.astype(np.float64) - baseline.astype(np.float64))


def _bit_equality(script: Script, engine: Pair) -> Measurement:
    pairs = [
        (edited[name], baseline[name])
        for edited, baseline in (
            *zip(engine.edited.steps, engine.baseline.steps, strict=True),
            (engine.edited.cache, engine.baseline.cache),
        )
        for name in edited
    ]
    equal = [np.array_equal(edited, baseline) for edited, baseline in pairs]
    return Measurement(
        f"{script.name}, effect", "bit-equal at strength 0", float(np.mean(equal)), 1.0, at_least=True
    )


def _differences(script: Script, oracle: Pair, engine: Pair) -> tuple[float, ...]:
    """Largest |engine − oracle| of the edited logits, per step."""
    return tuple(
        float(np.abs(wanted[LOGITS] - seen[LOGITS])[script.attended(step)].max())
        for step, (wanted, seen) in enumerate(zip(oracle.edited.steps, engine.edited.steps, strict=True))
    )


def _keep_worst(worst: dict[str, float], expected: NDArray[Any], actual: NDArray[Any]) -> None:
    """Fold two arrays of vectors (..., D) into the worst relative error and cosine seen so far."""
    wanted, seen = expected.astype(np.float64), actual.astype(np.float64)
    scale = np.abs(wanted).max()
    error = float(np.abs(wanted - seen).max() / scale) if scale else float(np.abs(seen).max())
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(seen, axis=-1)
    cosines = np.divide((wanted * seen).sum(axis=-1), norms, out=np.ones_like(norms), where=norms > 0)
    worst["max_abs"] = max(worst["max_abs"], error)
    worst["cosine"] = min(worst["cosine"], float(cosines.min()))


def _log_softmax(logits_NV: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits_NV.astype(np.float64) - logits_NV.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _kl(expected_NV: NDArray[Any], actual_NV: NDArray[Any]) -> NDArray[np.float64]:
    """KL(oracle ‖ engine) in nats, per row."""
    wanted, seen = _log_softmax(expected_NV), _log_softmax(actual_NV)
    return np.asarray((np.exp(wanted) * (wanted - seen)).sum(axis=-1))


def _top1_agrees(expected_NV: NDArray[Any], actual_NV: NDArray[Any], tolerance: float) -> NDArray[np.bool_]:
    """Whether the engine's best token is the oracle's, or tied with it within twice the error allowed."""
    chosen = np.take_along_axis(expected_NV, actual_NV.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return np.asarray(expected_NV.max(axis=-1) - chosen <= 2 * tolerance * np.abs(expected_NV).max())
