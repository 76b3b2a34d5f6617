"""`sweep`: a grid of steering settings measured on requests held out for it, and the one to ship.

Reads as its steps: read and check, collect statistics once, ask the undefended model once, measure every setting,
choose, write.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.calibrate import (
    REFUSAL_PROMPT,
    CalibrationSettings,
    calibration_provenance,
    calibration_set,
)
from calibration.checkpoint import hears_audio, processor_digest, read_config
from calibration.clips import Clips
from calibration.collection import Collecting, Collection
from calibration.directions import largest_rank, steering_plan
from calibration.errors import InputError
from calibration.kept_prompts import KeptStore
from calibration.magnitudes import steered_magnitudes
from calibration.model_options import ModelOptions
from calibration.overlap import SEEN, AllowedOverlap, Overlap, check_disjoint, check_kinds, seen_digests
from calibration.records import ReadSettings
from calibration.requests import RequestSet, check_benign_count
from calibration.states import check_clip
from calibration.unfinished import UnfinishedFile
from sarsteer_export.evaluation.eager import EagerRespondent
from sarsteer_export.evaluation.figures import BENIGN, HARMFUL, figures
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.evaluation.measure import MeasureSettings, measure, undefended, work
from sarsteer_export.judges.settings import JudgeSettings
from sarsteer_export.staging import SWEEP_STATISTICS, check_output
from sarsteer_export.sweeping.choice import Candidates, choose
from sarsteer_export.sweeping.grid import Grid, geometric
from sarsteer_export.sweeping.limits import Limits
from sarsteer_export.sweeping.points import Point, Reading, Unfinished
from sarsteer_export.sweeping.report import Sweep, judged_lines
from sarsteer_export.sweeping.written import write_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from calibration.states import Progress
    from calibration.statistics import StateStatistics
    from sarsteer_export.judges.judge import Judge

ALPHAS = tuple(geometric(0.01, 1.0, 21))
"""Ten to a decade, a decade on either side of the paper's 0.1: the length of the refusal direction differs by model."""

CALIBRATION = "calibration"
"""What an interrupted calibration is kept in, within the folder of the unfinished sweep."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepSettings:
    """Everything a sweep can be told.

    `harmful`, `benign`: requests to calibrate on, at most `limit` of each kind, drawn with the seed of `bootstrap`.
    `eval_harmful`, `eval_benign`: requests to choose by, at most `eval_limit`; figures to be reported need a third
    set. `early_stop`: a line is given up when so many alphas in succession left no benign request answered; 0
    measures all. `loading`: how the checkpoint is loaded and driven.
    """

    harmful: str | Path
    benign: str | Path
    eval_harmful: str | Path
    eval_benign: str | Path
    grid: Grid = field(default_factory=lambda: Grid(ALPHAS))
    limits: Limits = field(default_factory=Limits)
    candidates: Candidates = Candidates.ABLATED
    early_stop: int = 3
    refusal_prompt: str = REFUSAL_PROMPT
    limit: int | None = 100
    eval_limit: int | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    data: ReadSettings = field(default_factory=ReadSettings)
    allow_overlap: AllowedOverlap = AllowedOverlap.NONE
    device: str = "cpu"
    dtype: str = "float32"
    loading: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.early_stop < 0:
            raise InputError(f"early_stop is {self.early_stop}; expected at least 0")
        if not self.refusal_prompt:
            raise InputError("the refusal prompt is empty; without it there is no refusal direction")

    @property
    def calibration(self) -> CalibrationSettings:
        """How statistics are collected."""
        return CalibrationSettings(
            refusal_prompt=self.refusal_prompt,
            limit=self.limit,
            seed=self.bootstrap.seed,
            batch_size=self.measure.batch_size,
            data=self.data,
        )


@dataclass(frozen=True)
class _Inputs:
    """The model, and what it hears: `calibration` and `held_out` requests by kind."""

    lalm: Lalm
    clips: Clips
    calibration: dict[str, RequestSet]
    held_out: dict[str, RequestSet]
    overlap: Overlap

    @property
    def calibrated_on(self) -> tuple[SpokenRequest, ...]:
        return tuple(request for found in self.calibration.values() for request in found.requests)

    @property
    def asked(self) -> dict[str, Sequence[SpokenRequest]]:
        return {kind: found.requests for kind, found in self.held_out.items()}


def sweep(
    model: str | Path,
    settings: SweepSettings,
    output: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Measure every setting of the grid and write the folder `output`: the table, the picture, the chosen plan.

    An interrupted sweep is kept beside `output` and gone on from by the same call, also with another grid or other
    limits; so is a finished one that is overwritten. `restart` measures anew. Without a usable setting the folder
    holds no plan. Raises `InputError` for bad input, among it requests that calibration saw too, and for an
    unfinished sweep of other inputs; `UnsupportedError` when the judge cannot be used here.
    """
    target = check_output(output, overwrite=overwrite)
    inputs = _read(Path(model), settings)
    judge = settings.judge.open(device=settings.device)
    grid = _fitted(settings.grid, inputs)
    unfinished = Unfinished(target, _depends_on(inputs, settings))
    unfinished.begin(restart=restart)
    try:
        statistics, largest = _statistics(inputs, settings, unfinished, progress)
        reference, points = _measured(inputs, grid, statistics, judge, settings, unfinished, progress)
        choice = choose(judged_lines(points, settings.limits, reference), settings.candidates)
        found = Sweep(
            inputs=_depends_on(inputs, settings),
            overlap=inputs.overlap.counts,
            grid=grid,
            limits=settings.limits,
            candidates=settings.candidates,
            early_stop=settings.early_stop,
            undefended=reference,
            points=tuple(points),
            choice=choice,
        )
        plan = _chosen_plan(found, inputs, statistics, largest, settings, progress)
        found = write_sweep(found, plan, unfinished.folder / SWEEP_STATISTICS, target, overwrite=overwrite)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {len(unfinished.points)} measured settings are kept in {unfinished.folder}; the same "
            "command goes on from there, with --restart it measures anew"
        ) from None
    unfinished.remove()
    return found


def _read(model: Path, settings: SweepSettings) -> _Inputs:
    """All four sets, checked as far as is possible before the model has worked for hours."""
    hears = hears_audio(read_config(model))
    held_out = replace(settings.calibration, limit=settings.eval_limit)
    sets = {
        "calibration": (settings.harmful, settings.benign, settings.calibration),
        "held_out": (settings.eval_harmful, settings.eval_benign, held_out),
    }
    read = {
        name: {
            HARMFUL: calibration_set(harmful, how, hears=hears),
            BENIGN: calibration_set(benign, how, hears=hears),
        }
        for name, (harmful, benign, how) in sets.items()
    }
    for found in read.values():
        check_kinds(found[HARMFUL].requests, found[BENIGN].requests)
    lalm = settings.loading.load(model, device=settings.device, dtype=settings.dtype)
    clips = Clips(lalm)
    checks = {"calibration": clips.check, "held_out": lambda request: check_clip(lalm, request)}
    checked = {
        name: {kind: one.checked(checks[name], settings.data.on_error) for kind, one in kinds.items()}
        for name, kinds in read.items()
    }
    for name, kinds in checked.items():
        for kind, one in kinds.items():
            if not one.requests:
                raise InputError(f"{one.source}: no {kind} request is left ({name}); expected at least one")
    benign = checked["calibration"][BENIGN]
    check_benign_count(benign.requests, benign.source)
    train, test = (
        [request for found in checked[name].values() for request in found.requests]
        for name in ("calibration", "held_out")
    )
    overlap = check_disjoint(train, test, settings.allow_overlap)
    return _Inputs(lalm, clips, checked["calibration"], checked["held_out"], overlap)


def _fitted(grid: Grid, inputs: _Inputs) -> Grid:
    """The grid with no rank above what the benign clips span. Raises `InputError` for blocks that do not exist."""
    blocks = len(inputs.lalm.parts.blocks)
    for layers in grid.layer_sets:
        if layers is not None and (outside := [layer for layer in layers if not 0 <= layer < blocks]):
            raise InputError(f"layer {outside[0]} does not exist; expected 0 to {blocks - 1}")
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise InputError(f"layers {layers}: expected at least one block, and each of them once")
    benign = len(inputs.calibration[BENIGN].requests)
    limit = largest_rank(benign, inputs.lalm.parts.hidden_size)
    if max(grid.ranks) <= limit:
        return grid
    logger.warning(
        "rank %d is more than %d benign clips can span; using rank %d", max(grid.ranks), benign, limit
    )
    return replace(grid, ranks=tuple(dict.fromkeys(min(rank, limit) for rank in grid.ranks)))


def _depends_on(inputs: _Inputs, settings: SweepSettings) -> dict[str, Any]:
    """All that a point depends on beside its setting: not the grid, nor the limits, which may change on the way."""
    sets = inputs.calibration
    provenance = calibration_provenance(inputs.lalm, sets[HARMFUL], sets[BENIGN], settings.calibration)
    names = (
        "model",
        "model_id",
        "model_dtype",
        "model_fingerprint",
        "chat_template_sha256",
        "refusal_prompt",
    )
    return {
        **{name: provenance[name] for name in (*names, HARMFUL, BENIGN, "versions")},
        "model_driven_by": provenance.get("model_driven_by"),
        "processor": processor_digest(inputs.lalm.path),
        **{f"eval_{kind}": found.summary() for kind, found in inputs.held_out.items()},
        "judge": settings.judge.identity(),
        **asdict(settings.measure),
        **asdict(settings.bootstrap),
        "device": settings.device,
    }


def _statistics(
    inputs: _Inputs, settings: SweepSettings, unfinished: Unfinished, progress: Progress | None
) -> tuple[StateStatistics, list[float]]:
    """What every plan is made from, and the largest |h| of every block; collected once and kept."""
    kept = unfinished.statistics()
    if kept is not None:
        return kept[0], [float(value) for value in kept[1]["largest_magnitude"]]
    file = UnfinishedFile(unfinished.folder / CALIBRATION, _depends_on(inputs, settings))
    how = Collecting(settings.measure.batch_size, progress, file)
    requests = (inputs.calibration[HARMFUL].requests, inputs.calibration[BENIGN].requests)
    with KeptStore.opened() as store:
        collection = Collection(inputs.lalm, requests, settings.refusal_prompt, store, how, inputs.clips)
        collection.begin()
        statistics, largest = collection.collect()
    provenance = {"largest_magnitude": largest, "inputs": _depends_on(inputs, settings)}
    statistics.save(unfinished.folder / SWEEP_STATISTICS, provenance)
    return statistics, largest


def _measured(
    inputs: _Inputs,
    grid: Grid,
    statistics: StateStatistics,
    judge: Judge,
    settings: SweepSettings,
    unfinished: Unfinished,
    progress: Progress | None,
) -> tuple[dict[str, Reading], list[Point]]:
    """The undefended model's figures, and a point for every setting that was not given up."""
    respondent, requests = EagerRespondent(inputs.lalm), inputs.asked
    left = {
        line: [alpha for alpha in grid.alphas if (line, alpha) not in unfinished.points]
        for line in grid.lines
    }
    counter = _Counter(progress, requests, sum(map(len, left.values())))
    reference = undefended(respondent, requests, judge, settings.measure, advance=counter)
    points: list[Point] = []
    for line in grid.lines:
        hopeless = 0
        for alpha in grid.alphas:
            if settings.early_stop and hopeless >= settings.early_stop:
                counter.give_up(sum(other >= alpha for other in left[line]))
                break
            point = unfinished.points.get((line, alpha))
            if point is None:
                plan = steering_plan(statistics, line.settings(alpha))
                measured = measure(
                    respondent, plan, requests, judge, settings.measure, reference=reference, advance=counter
                )
                found = figures(measured, settings.bootstrap)
                point = Point(line, alpha, {name: Reading.of(estimate) for name, estimate in found.items()})
                unfinished.add(point)
            points.append(point)
            hopeless = hopeless + 1 if point.figures["benign_answered"].value == 0 else 0
    counter.end()
    base = figures(reference.measured, settings.bootstrap)
    return {name: Reading.of(estimate) for name, estimate in base.items()}, points


class _Counter:
    """Tells `progress` of requests as they are answered, out of those that are left."""

    def __init__(
        self, progress: Progress | None, requests: dict[str, Sequence[SpokenRequest]], settings: int
    ) -> None:
        self._progress = progress
        self._each = work(requests, 1, undefended_asked=False, damage=True)
        self._done, self._total = 0, work(requests, settings, undefended_asked=True, damage=True)

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None and self._done < self._total:  # the end is told of once, by `end`
            self._progress("sweep", self._done, self._total)

    def give_up(self, settings: int) -> None:
        """So many settings will not be measured."""
        self._total -= settings * self._each

    def end(self) -> None:
        """Everything is answered."""
        if self._progress is not None:
            self._progress("sweep", self._done, self._done)


def _chosen_plan(
    found: Sweep,
    inputs: _Inputs,
    statistics: StateStatistics,
    largest: list[float],
    settings: SweepSettings,
    progress: Progress | None,
) -> SteeringPlan | None:
    """The plan of the chosen setting, as `calibrate` writes it, with how it was chosen."""
    line, alpha = found.choice.line, found.choice.alpha
    if line is None or alpha is None:
        return None
    how = replace(settings.calibration, steering=line.settings(alpha))
    sets = inputs.calibration
    provenance = calibration_provenance(inputs.lalm, sets[HARMFUL], sets[BENIGN], how)
    plan = steering_plan(statistics, how.steering)
    steered = steered_magnitudes(
        inputs.lalm, inputs.calibrated_on, plan, batch_size=settings.measure.batch_size, progress=progress
    )
    held_out = [request for asked in inputs.asked.values() for request in asked]
    extra = {
        # What a setting was chosen by is no test of it either.
        SEEN: seen_digests((*inputs.calibrated_on, *held_out)),
        "largest_magnitude": {"unsteered": largest, "steered": steered},
        "sweep": found.summary(),
    }
    return replace(plan, provenance={**provenance, **extra})
