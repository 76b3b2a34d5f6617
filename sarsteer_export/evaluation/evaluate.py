"""`evaluate`: what a bundle or a checkpoint says to harmful and benign speech, steered, undefended and at random.

Reads as its steps: read and check, open who is asked, ask every system on every runtime, compare.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.overlap import check_kinds, check_unseen
from calibration.records import check_audio_file
from calibration.requests import read_request_set
from sarsteer_export.evaluation.agreement import Agreement, agreement
from sarsteer_export.evaluation.figures import BENIGN, HARMFUL, differences, figures, per_prompt
from sarsteer_export.evaluation.measure import Reference, measure, undefended, work
from sarsteer_export.evaluation.report import MARK, Evaluation, OutputRecord, Row, any_marked
from sarsteer_export.evaluation.subjects import open_subject, takes_clips
from sarsteer_export.evaluation.systems import UNDEFENDED, System, SystemKind, systems_of
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from calibration.records import SpokenRequest
    from calibration.requests import RequestSet
    from calibration.states import Progress
    from sarsteer_export.evaluation.measure import Measured
    from sarsteer_export.evaluation.respondent import Respondent
    from sarsteer_export.evaluation.settings import EvaluationSettings
    from sarsteer_export.evaluation.subjects import Subject
    from sarsteer_export.judges.judge import Judge

PACKAGES = ("sarsteer-export", "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "numpy")


@dataclass
class _Counter:
    """Tells `progress` of requests as they are answered."""

    progress: Progress | None
    total: int
    done: int = 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress("evaluate", self.done, self.total)


def evaluate(
    target: str | Path, settings: EvaluationSettings, *, progress: Progress | None = None
) -> Evaluation:
    """Ask a bundle folder or a checkpoint directory everything, and report what became of it.

    Raises `InputError` for bad input, among it a bundle that was not made from `model`, and requests that a plan was
    calibrated on; `UnsupportedError` when the engine, or the judge, cannot be used here.
    """
    sets = _read(settings, hears=takes_clips(Path(target)))
    judge = settings.judge.open(device=settings.device)
    with open_subject(Path(target), settings) as subject:
        systems = systems_of(subject.plans, settings.random_seeds)
        on_error = settings.data.on_error
        sets = {kind: found.checked(subject.check, on_error) for kind, found in sets.items()}
        requests: dict[str, Sequence[SpokenRequest]] = {kind: found.requests for kind, found in sets.items()}
        overlaps = {
            given.label: check_unseen(
                given.plan,
                [request for asked in requests.values() for request in asked],
                settings.allow_overlap,
            )
            for given in subject.plans
        }
        asked, notes = _ask(subject, systems, requests, judge, progress)
    rows = tuple(
        _row(system, respondent.runtime, found, settings)
        for respondent, found in asked
        for system in systems
        if system.name in found
    )
    agreements: tuple[Agreement, ...] = ()
    if len(asked) == 2:
        (_, eager), (_, engine) = asked
        agreements = tuple(
            agreement(system.name, requests, eager[system.name], engine[system.name])
            for system in systems
            if system.name in eager and system.name in engine
        )
    about = {
        "target": subject.target,
        "plans": {given.label: given.plan.digest() for given in subject.plans},
        "judge": settings.judge.identity(),
        "requests": {kind: found.summary() for kind, found in sets.items()},
        "overlap": {label: overlap.counts for label, overlap in overlaps.items()},
        "settings": {
            **asdict(subject.measure),
            **asdict(settings.bootstrap),
            "random_seeds": list(settings.random_seeds),
            "limit": settings.limit,
        },
        "versions": installed_versions(*PACKAGES),
    }
    notes += [
        f"{label}: requests that calibration saw: {overlap.text()}, which was allowed"
        for label, overlap in overlaps.items()
        if any(overlap.counts.values())
    ]
    return Evaluation(
        about=about,
        rows=rows,
        agreements=agreements,
        notes=(*_standing_notes(rows, settings), *notes),
        outputs=tuple(_records(asked, systems, requests)),
    )


def _read(settings: EvaluationSettings, *, hears: bool) -> dict[str, RequestSet]:
    """Both sets of requests, their files checked, nothing of them heard yet; text alone where nothing `hears`."""
    how = replace(settings.data, require_audio=hears)
    sets = {
        kind: read_request_set(
            data, limit=settings.limit, seed=settings.bootstrap.seed, settings=how
        ).checked(check_audio_file, settings.data.on_error)
        for kind, data in ((HARMFUL, settings.harmful), (BENIGN, settings.benign))
    }
    check_kinds(sets[HARMFUL].requests, sets[BENIGN].requests)
    return sets


Asked = list[tuple["Respondent", dict[str, list["Measured"]]]]


def _ask(
    subject: Subject,
    systems: Sequence[System],
    requests: dict[str, Sequence[SpokenRequest]],
    judge: Judge,
    progress: Progress | None,
) -> tuple[Asked, list[str]]:
    """What every system that a respondent serves said, by the system's name; and notes on those it does not."""
    served = {
        respondent.runtime: [
            system for system in systems if all(respondent.serves(plan) for plan in system.plans)
        ]
        for respondent in subject.respondents
    }
    total = 0
    notes: list[str] = []
    for runtime, found in served.items():
        plain = any(system.kind is SystemKind.UNDEFENDED for system in found)
        runs = sum(len(system.plans) for system in found) - plain
        total += work(requests, runs, undefended_asked=plain, damage=plain)
        if missing := [system.name for system in systems if system not in found]:
            notes.append(
                f"{runtime} holds no unsteered decoder, so it was not asked: {'; '.join(missing)}"
                + ("" if plain else "; damage on it was not measured")
            )
    counter = _Counter(progress, total)
    asked: Asked = []
    for respondent in subject.respondents:
        reference: Reference | None = None
        said: dict[str, list[Measured]] = {}
        for system in served[respondent.runtime]:
            if system.kind is SystemKind.UNDEFENDED and len(systems) > 1:  # else there is nothing to compare
                reference = undefended(respondent, requests, judge, subject.measure, advance=counter)
                said[system.name] = [reference.measured]
                continue
            said[system.name] = [
                measure(
                    respondent,
                    plan,
                    requests,
                    judge,
                    subject.measure,
                    reference=reference,
                    advance=counter,
                )
                for plan in system.plans
            ]
        asked.append((respondent, said))
    return asked, notes


def _row(
    system: System, runtime: str, said: Mapping[str, Sequence[Measured]], settings: EvaluationSettings
) -> Row:
    prompts = per_prompt(said[system.name])
    compared = None
    if system.kind is not SystemKind.UNDEFENDED and UNDEFENDED in said:
        compared = differences(prompts, per_prompt(said[UNDEFENDED]), settings.bootstrap)
    return Row(
        system=system.name,
        kind=system.kind.value,
        runtime=runtime,
        plans=tuple(None if plan is None else plan.digest() for plan in system.plans),
        figures=figures(prompts, settings.bootstrap),
        differences=compared,
    )


def _records(
    asked: Asked, systems: Sequence[System], requests: dict[str, Sequence[SpokenRequest]]
) -> Iterator[OutputRecord]:
    for respondent, found in asked:
        for system in systems:
            for run, measured in enumerate(found.get(system.name, ())):
                for kind, outputs in measured.outputs.items():
                    for index, (request, output) in enumerate(zip(requests[kind], outputs, strict=True)):
                        yield OutputRecord(
                            system=system.name,
                            runtime=respondent.runtime,
                            run=run,
                            requests=kind,
                            index=index,
                            audio=None if request.audio is None else str(request.audio),
                            text=request.text,
                            transcript=request.transcript,
                            output=output.text,
                            verdict=output.verdict.value,
                        )


def _standing_notes(rows: Sequence[Row], settings: EvaluationSettings) -> list[str]:
    """What a reader of the table needs to know, whatever it says."""
    boot = settings.bootstrap
    notes = [
        f"[a, b]: {boot.confidence:.0%} intervals, percentile bootstrap over prompts ({boot.resamples} resamples, "
        f"seed {boot.seed})"
    ]
    if any_marked(rows):
        notes.append(
            f"{MARK} all prompts came out alike, where the bootstrap has no width: Wilson's interval instead"
        )
    if any(row.kind == SystemKind.RANDOM.value for row in rows):
        count = len(settings.random_seeds)
        notes.append(f"random: directions of the same norms, the mean over {count} seed{'s' * (count > 1)}")
    return notes
