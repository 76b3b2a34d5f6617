"""`evaluate`: what a bundle or a checkpoint says to harmful and benign speech, steered, undefended and at random.

Reads as its steps: read and check, open who is asked, ask every system on every runtime, compare.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.audio import MAYBE_SHORT_SECONDS
from calibration.checkpoint import fingerprint, read_config
from calibration.errors import InputError, UnsupportedError
from calibration.overlap import AllowedOverlap, check_kinds, check_unseen
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.records import ReadSettings, SpokenRequest, check_audio_file
from calibration.requests import RequestSet, load_audio, read_request_set
from engines.backends import CPU_BACKEND, Runtime
from sarsteer_export.bundle.bundle import Bundle, load_bundle
from sarsteer_export.bundle.manifest import MANIFEST, PLAN, Manifest
from sarsteer_export.evaluation.agreement import Agreement, agreement
from sarsteer_export.evaluation.engine import EngineRespondent
from sarsteer_export.evaluation.figures import BENIGN, HARMFUL, differences, figures, per_prompt
from sarsteer_export.evaluation.intervals import Bootstrap
from sarsteer_export.evaluation.measure import MeasureSettings, Reference, measure, undefended, work
from sarsteer_export.evaluation.report import MARK, Evaluation, OutputRecord, Row, any_marked
from sarsteer_export.evaluation.systems import UNDEFENDED, LabelledPlan, System, SystemKind, systems_of
from sarsteer_export.judges.settings import JudgeSettings
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from calibration.lalm import Lalm
    from calibration.model_options import ModelOptions
    from calibration.states import Progress
    from sarsteer_export.evaluation.measure import Measured
    from sarsteer_export.evaluation.respondent import Respondent
    from sarsteer_export.judges.judge import Judge

OWN_PLAN = "steered"
"""What reports call the plan of a bundle that no `plans` entry names."""
PACKAGES = ("sarsteer-export", "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "numpy")


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything an evaluation can be told.

    `plans`: plans or their files by label; beside a bundle's own, which an entry with the same edits only names.
    `model`: the checkpoint a bundle was made from, to ask the eager model too. `engine`: what runs the bundle.
    `random_seeds`: one random control per plan and seed; none leaves them out. `limit`: the most requests of each
    kind, drawn with the seed of `bootstrap`. `loading`: how the eager model is loaded and driven. `dtype`: its
    precision, by default the bundle's, else float32. `device_map`: how accelerate spreads it over devices, instead
    of `device`.
    """

    harmful: str | Path
    benign: str | Path
    plans: Mapping[str, str | Path | SteeringPlan] = field(default_factory=dict)
    model: str | Path | None = None
    engine: str = CPU_BACKEND.name
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    random_seeds: tuple[int, ...] = (0, 1, 2)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    data: ReadSettings = field(default_factory=ReadSettings)
    allow_overlap: AllowedOverlap = AllowedOverlap.NONE
    limit: int | None = None
    loading: ModelOptions | None = None
    device: str = "cpu"
    device_map: str | dict[str, Any] | None = None
    dtype: str | None = None
    force: bool = False


@dataclass(frozen=True)
class _Opened:
    """Who can be asked and how many requests at once, the plans, and what reports say of the target."""

    respondents: tuple[Respondent, ...]
    plans: tuple[LabelledPlan, ...]
    target: dict[str, Any]
    check: Callable[[SpokenRequest], object]
    measure: MeasureSettings


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
    folder = Path(target)
    sets = _read(settings)
    with ExitStack() as stack:
        judge = settings.judge.open(device=settings.device)
        opened = stack.enter_context(
            _bundle(folder, settings) if is_bundle(folder) else _checkpoint(folder, settings)
        )
        systems = systems_of(opened.plans, settings.random_seeds)
        on_error = settings.data.on_error
        sets = {kind: found.checked(opened.check, on_error) for kind, found in sets.items()}
        requests: dict[str, Sequence[SpokenRequest]] = {kind: found.requests for kind, found in sets.items()}
        overlaps = {
            given.label: check_unseen(
                given.plan,
                [request for asked in requests.values() for request in asked],
                settings.allow_overlap,
            )
            for given in opened.plans
        }
        asked, notes = _ask(opened, systems, requests, judge, progress)
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
        "target": opened.target,
        "plans": {given.label: given.plan.digest() for given in opened.plans},
        "judge": settings.judge.identity(),
        "requests": {kind: found.summary() for kind, found in sets.items()},
        "overlap": {label: overlap.counts for label, overlap in overlaps.items()},
        "settings": {
            **asdict(opened.measure),
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


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle's manifest; otherwise it has to be a checkpoint."""
    return (folder / MANIFEST).is_file()


def _read(settings: EvaluationSettings) -> dict[str, RequestSet]:
    """Both sets of requests, their files checked, nothing of them heard yet."""
    sets = {
        kind: read_request_set(
            data, limit=settings.limit, seed=settings.bootstrap.seed, settings=settings.data
        ).checked(check_audio_file, settings.data.on_error)
        for kind, data in ((HARMFUL, settings.harmful), (BENIGN, settings.benign))
    }
    check_kinds(sets[HARMFUL].requests, sets[BENIGN].requests)
    return sets


@contextmanager
def _checkpoint(folder: Path, settings: EvaluationSettings) -> Iterator[_Opened]:
    """The eager model of a checkpoint directory."""
    read_config(folder)
    if settings.model is not None:
        raise InputError(f"{folder}: is a checkpoint itself; --model goes with a bundle")
    if not settings.plans:
        raise InputError(f"{folder}: a checkpoint is evaluated with a plan; give at least one --plan")
    if settings.engine != CPU_BACKEND.name:
        raise InputError(f"{folder}: is a checkpoint; --engine {settings.engine} runs a bundle")
    plans = [LabelledPlan(label, _loaded(plan)) for label, plan in settings.plans.items()]
    lalm, respondent = _eager(folder, settings.dtype or "float32", settings)
    for given in plans:
        respondent.serves(given.plan)
    target = {
        "model": folder.name,
        "class": type(lalm.model).__name__,
        "fingerprint": lalm.fingerprint,
        "dtype": settings.dtype or "float32",
    }
    yield _Opened((respondent,), tuple(plans), target, _clip_check(lalm), settings.measure)


@contextmanager
def _bundle(folder: Path, settings: EvaluationSettings) -> Iterator[_Opened]:
    """A bundle on its engine and, where its checkpoint is given, the eager model before it."""
    manifest = Manifest.read(folder)
    made_from = manifest.model["fingerprint"]
    if settings.model is not None:
        read_config(Path(settings.model))
        if (found := fingerprint(Path(settings.model))) != made_from:
            raise InputError(
                f"{folder}: was made from another checkpoint: its fingerprint is {made_from[:12]}, that of "
                f"{settings.model} is {found[:12]}; give the checkpoint it was built from"
            )
    dtype = manifest.model["dtype"]
    if settings.dtype is not None and settings.dtype != dtype:
        raise InputError(
            f"{folder}: is a bundle in {dtype}; --dtype {settings.dtype} would compare unlike models"
        )
    manifest.check_hashes(folder)
    plans = _plans_of(folder, made_from, settings)
    with load_bundle(folder, engine=settings.engine) as bundle:
        engine = EngineRespondent(bundle)
        if settings.model is None:
            respondents: tuple[Respondent, ...] = (engine,)
            check = _frontend_check(bundle)
        else:
            lalm, eager = _eager(Path(settings.model), dtype, settings)
            _check_driven_alike(manifest, lalm)
            if lalm.hears and not bundle.hears:
                raise UnsupportedError(
                    f"{folder}: {_hears_nothing(manifest)}; evaluate its checkpoint with --plan"
                )
            respondents, check = (eager, engine), _clip_check(lalm)
        target = {"bundle": folder.name, **manifest.model, "engine": settings.engine}
        yield _Opened(respondents, plans, target, check, _fitting(folder, bundle, settings.measure))


def _plans_of(folder: Path, made_from: str, settings: EvaluationSettings) -> tuple[LabelledPlan, ...]:
    """The bundle's own plan, under its label if one is given, and the others."""
    own = SteeringPlan.load(folder / PLAN)
    given = [LabelledPlan(label, _loaded(plan)) for label, plan in settings.plans.items()]
    for one in given:
        check_plan_fits(
            one.plan,
            hidden_size=own.hidden_size,
            num_layers=own.num_layers,
            fingerprint=made_from,
            force=settings.force,
        )
    named = any(one.plan.digest() == own.digest() for one in given)
    return tuple(given if named else [LabelledPlan(OWN_PLAN, own), *given])


def _fitting(folder: Path, bundle: Bundle, wanted: MeasureSettings) -> MeasureSettings:
    """The same with batches that the bundle's engine admits."""
    if bundle.backend.runtime is Runtime.ONNX_RUNTIME:
        return wanted
    from sarsteer_export.bundle_engines import rows_of

    rows = rows_of(folder, bundle.manifest.engine(bundle.backend.name))
    return wanted if rows is None else replace(wanted, batch_size=min(wanted.batch_size, rows))


def _loaded(plan: str | Path | SteeringPlan) -> SteeringPlan:
    return plan if isinstance(plan, SteeringPlan) else SteeringPlan.load(plan)


def _eager(folder: Path, dtype: str, settings: EvaluationSettings) -> tuple[Lalm, Respondent]:
    from calibration.model_options import ModelOptions
    from sarsteer_export.evaluation.eager import EagerRespondent

    lalm = (settings.loading or ModelOptions()).load(
        folder, device=settings.device, dtype=dtype, device_map=settings.device_map
    )
    return lalm, EagerRespondent(lalm, force=settings.force)


def _check_driven_alike(manifest: Manifest, lalm: Lalm) -> None:
    from calibration.model_options import check_driven_alike

    check_driven_alike(manifest.model.get("driven_by"), lalm)


def _hears_nothing(manifest: Manifest) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in manifest.missing.items())
    return f"the bundle hears nothing ({reasons or 'its model takes no audio'})"


def _clip_check(lalm: Lalm) -> Callable[[SpokenRequest], object]:
    from calibration.states import check_clip

    return lambda request: check_clip(lalm, request)


def _frontend_check(bundle: Bundle) -> Callable[[SpokenRequest], object]:
    front = bundle.frontend

    def check(request: SpokenRequest) -> None:
        if not bundle.hears:
            if request.audio is not None:
                raise InputError(
                    f"{request}: {_hears_nothing(bundle.manifest)}; expected a record of text alone"
                )
            return
        source = request.clip()
        clip = load_audio(source, sampling_rate=front.sampling_rate, max_seconds=front.max_audio_seconds)
        if clip.size < MAYBE_SHORT_SECONDS * front.sampling_rate:
            bundle.prompts([source], [""])  # refuses a clip that its encoder makes nothing of

    return check


Asked = list[tuple["Respondent", dict[str, list["Measured"]]]]


def _ask(
    opened: _Opened,
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
        for respondent in opened.respondents
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
    for respondent in opened.respondents:
        reference: Reference | None = None
        said: dict[str, list[Measured]] = {}
        for system in served[respondent.runtime]:
            if system.kind is SystemKind.UNDEFENDED:
                reference = undefended(respondent, requests, judge, opened.measure, advance=counter)
                said[system.name] = [reference.measured]
                continue
            said[system.name] = [
                measure(
                    respondent,
                    plan,
                    requests,
                    judge,
                    opened.measure,
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
