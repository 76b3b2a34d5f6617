"""What is evaluated: the eager model of a checkpoint, or a bundle on its engine and, beside it, its checkpoint."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.audio import MAYBE_SHORT_SECONDS
from calibration.checkpoint import fingerprint, hears_audio, read_config
from calibration.errors import InputError, UnsupportedError
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.requests import load_audio
from engines.backends import CPU_BACKEND, Runtime
from sarsteer_export.bundle.bundle import Bundle, load_bundle
from sarsteer_export.bundle.manifest import ENCODER, MANIFEST, PLAN, Manifest
from sarsteer_export.evaluation.engine import EngineRespondent
from sarsteer_export.evaluation.systems import LabelledPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from calibration.lalm import Lalm
    from calibration.records import SpokenRequest
    from sarsteer_export.evaluation.measure import MeasureSettings
    from sarsteer_export.evaluation.respondent import Respondent
    from sarsteer_export.evaluation.settings import EvaluationSettings

OWN_PLAN = "steered"
"""What reports call the plan of a bundle that no `plans` entry names."""


@dataclass(frozen=True)
class Subject:
    """Who can be asked and how many requests at once, the plans, and what reports say of the target."""

    respondents: tuple[Respondent, ...]
    plans: tuple[LabelledPlan, ...]
    target: dict[str, Any]
    check: Callable[[SpokenRequest], object]
    measure: MeasureSettings


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle's manifest; otherwise it has to be a checkpoint."""
    return (folder / MANIFEST).is_file()


def open_subject(folder: Path, settings: EvaluationSettings) -> AbstractContextManager[Subject]:
    """A bundle folder or a checkpoint directory, held open for the length of a `with` block.

    Raises `InputError` for a bundle that was not made from `model`, plans that do not fit, and options that go with
    the other kind of folder; `UnsupportedError` when the engine cannot be used here.
    """
    return _bundle(folder, settings) if is_bundle(folder) else _checkpoint(folder, settings)


@contextmanager
def _checkpoint(folder: Path, settings: EvaluationSettings) -> Iterator[Subject]:
    """The eager model of a checkpoint directory."""
    read_config(folder)
    if settings.model is not None:
        raise InputError(f"{folder}: is a checkpoint itself; --model goes with a bundle")
    if settings.engine is not None:
        raise InputError(
            f"{folder}: is a checkpoint, run by PyTorch; --engine {settings.engine} runs a bundle"
        )
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
    yield Subject((respondent,), tuple(plans), target, _clip_check(lalm), settings.measure)


@contextmanager
def _bundle(folder: Path, settings: EvaluationSettings) -> Iterator[Subject]:
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
    engine_name = settings.engine or CPU_BACKEND.name
    with load_bundle(folder, engine=engine_name) as bundle:
        engine = EngineRespondent(bundle)
        respondents: tuple[Respondent, ...] = (engine,)
        check = _frontend_check(
            bundle
        )  # before eager is asked for hours: a bundle may be unable to make its inputs
        if settings.model is not None:
            lalm, eager = _eager(Path(settings.model), dtype, settings)
            _check_driven_alike(manifest, lalm)
            if lalm.hears and not bundle.hears:
                raise UnsupportedError(
                    f"{folder}: {_hears_nothing(manifest)}; evaluate its checkpoint with --plan"
                )
            respondents, check = (eager, engine), _clip_check(lalm)
        target = {"bundle": folder.name, **manifest.model, "engine": engine_name}
        yield Subject(respondents, plans, target, check, _fitting(folder, bundle, settings.measure))


def takes_clips(folder: Path) -> bool:
    """Whether a bundle or a checkpoint is asked with clips; the others, with records of text alone."""
    return (
        ENCODER in Manifest.read(folder).components if is_bundle(folder) else hears_audio(read_config(folder))
    )


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
    if not bundle.hears:
        return lambda request: _check_text_alone(bundle, request)
    # Asked here, once: a processor that cannot be loaded is no fault of a record.
    rate, longest = bundle.frontend.sampling_rate, bundle.frontend.max_audio_seconds

    def check(request: SpokenRequest) -> None:
        source = request.clip()
        clip = load_audio(source, sampling_rate=rate, max_seconds=longest)
        if clip.size < MAYBE_SHORT_SECONDS * rate:
            bundle.prompts([source], [""])  # refuses a clip that its encoder makes nothing of

    return check


def _check_text_alone(bundle: Bundle, request: SpokenRequest) -> None:
    if request.audio is None:
        return
    reason = f"{request}: {_hears_nothing(bundle.manifest)}"
    if bundle.manifest.missing:
        raise UnsupportedError(f"{reason}; evaluate its checkpoint with --plan")
    raise InputError(f"{reason}; expected a record of text alone")
