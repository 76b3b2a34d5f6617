"""`sweep`: a grid of steering settings measured on requests held out for it, and the one to ship.

Reads as its steps: read and check, collect statistics once, ask the undefended model once, measure every setting,
choose, write.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.calibrate import calibration_provenance
from calibration.collection import Collecting, Collection
from calibration.directions import steering_plan
from calibration.kept_prompts import KeptStore
from calibration.magnitudes import steered_magnitudes
from calibration.overlap import SEEN, seen_digests
from calibration.unfinished import UnfinishedFile
from sarsteer_export.evaluation.eager import EagerRespondent
from sarsteer_export.evaluation.figures import BENIGN, HARMFUL, figures
from sarsteer_export.evaluation.measure import measure, undefended, work
from sarsteer_export.staging import SWEEP_STATISTICS, check_output
from sarsteer_export.sweeping.choice import choose
from sarsteer_export.sweeping.inputs import SweepInputs, depends_on, fitted, read_inputs
from sarsteer_export.sweeping.lock import check_free, locked
from sarsteer_export.sweeping.points import Point, Reading, Unfinished, unfinished_folder
from sarsteer_export.sweeping.report import Sweep, judged_lines
from sarsteer_export.sweeping.written import write_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from calibration.states import Progress
    from calibration.statistics import StateStatistics
    from sarsteer_export.judges.judge import Judge
    from sarsteer_export.sweeping.grid import Grid
    from sarsteer_export.sweeping.settings import SweepSettings

CALIBRATION = "calibration"
"""What an interrupted calibration is kept in, within the folder of the unfinished sweep."""


def sweep(
    model: str | Path,
    settings: SweepSettings,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> Sweep:
    """Measure every setting of the grid and write the folder `output`: the table, the picture, the chosen plan.

    An interrupted sweep is kept beside `output` and gone on from by the same call, also with another grid or other
    limits; so is a finished one that is overwritten. Without `resume` everything is measured anew. What is overwritten
    stays until the new sweep is whole, also where that has no usable setting and so no plan. Raises `InputError` for
    bad input, among it requests that calibration saw too, and for a sweep there that is of other inputs, or under
    way in another process; `UnsupportedError` when the judge cannot be used here.
    """
    target = check_output(output, overwrite=overwrite)
    check_free(unfinished_folder(target))  # before a model is loaded for nothing
    inputs = read_inputs(Path(model), settings)
    judge = settings.judge.open(device=settings.device)
    grid = fitted(settings.grid, inputs)
    unfinished = Unfinished(target, depends_on(inputs, settings))
    with locked(unfinished.folder):
        check_output(target, overwrite=overwrite)  # another sweep may have ended meanwhile
        unfinished.begin(resume=resume)
        try:
            found, plan = _swept(inputs, grid, judge, settings, unfinished, progress)
            kept = unfinished.folder / SWEEP_STATISTICS
            found = write_sweep(found, plan, kept, target, overwrite=overwrite)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {len(unfinished.points)} measured settings are kept in {unfinished.folder}; the same "
                "command goes on from there, with --no-resume it starts anew"
            ) from None
        unfinished.remove()
    return found


def _swept(
    inputs: SweepInputs,
    grid: Grid,
    judge: Judge,
    settings: SweepSettings,
    unfinished: Unfinished,
    progress: Progress | None,
) -> tuple[Sweep, SteeringPlan | None]:
    """The whole grid measured, and the plan of the chosen setting if there is one."""
    statistics, largest = _statistics(inputs, settings, unfinished, progress)
    reference, points = _measured(inputs, grid, statistics, judge, settings, unfinished, progress)
    choice = choose(judged_lines(points, settings.limits, reference), settings.candidates)
    found = Sweep(
        inputs=depends_on(inputs, settings),
        overlap=inputs.overlap.counts,
        grid=grid,
        limits=settings.limits,
        candidates=settings.candidates,
        early_stop=settings.early_stop,
        undefended=reference,
        points=tuple(points),
        choice=choice,
    )
    return found, _chosen_plan(found, inputs, statistics, largest, settings, progress)


def _statistics(
    inputs: SweepInputs, settings: SweepSettings, unfinished: Unfinished, progress: Progress | None
) -> tuple[StateStatistics, list[float]]:
    """What every plan is made from, and the largest |h| of every block; collected once and kept."""
    kept = unfinished.statistics()
    if kept is not None:
        return kept[0], [float(value) for value in kept[1]["largest_magnitude"]]
    file = UnfinishedFile(unfinished.folder / CALIBRATION, depends_on(inputs, settings))
    how = Collecting(settings.measure.batch_size, progress, file)
    requests = (inputs.calibration[HARMFUL].requests, inputs.calibration[BENIGN].requests)
    with KeptStore.opened() as store:
        collection = Collection(inputs.lalm, requests, settings.refusal_prompt, store, how, inputs.clips)
        collection.begin()
        statistics, largest = collection.collect()
    provenance = {"largest_magnitude": largest, "inputs": depends_on(inputs, settings)}
    statistics.save(unfinished.folder / SWEEP_STATISTICS, provenance)
    return statistics, largest


def _measured(
    inputs: SweepInputs,
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
    inputs: SweepInputs,
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
