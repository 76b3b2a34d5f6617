"""`build`: from spoken requests and a checkpoint to a proven bundle, step by step.

Each step is a typed function; `build` reads as the pipeline. Everything is written to a staging folder that
becomes the bundle when the last step has passed. Steps whose inputs are those of the bundle that already
stands at the output are taken from it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.calibrate import CalibrationRun, calibrate, unfinished_of
from calibration.errors import ParityError, UnsupportedError
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.states import check_clip
from calibration.unfinished import UnfinishedFile
from engines.backends import Runtime
from engines.report import ParityReport, Verdict
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import patch_model
from sarsteer_export.around_decoder import ROLLOUT_TOKENS
from sarsteer_export.behaviour import BATCH_SIZE, BehaviourReport, measure_behaviour
from sarsteer_export.building.inputs import BuildInputs, engine_stage, read_inputs
from sarsteer_export.building.manifest import describe
from sarsteer_export.building.reports import BuildResult, data_counts, finish, up_to_date, with_table
from sarsteer_export.building.reuse import (
    check_known_range,
    copy_engine,
    copy_export,
    earlier_bundle,
    reusable_stages,
)
from sarsteer_export.building.space import check_space, needed_bytes
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import (
    ONNX_FOLDER,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    EngineEntry,
)
from sarsteer_export.bundle_engines import add_engine, prove_engine, rows_of
from sarsteer_export.bundle_frontend import missing_frontend, write_frontend
from sarsteer_export.exporting.export import export
from sarsteer_export.parity_run import ParityRun, parity_requests
from sarsteer_export.prompt_lengths import Asked, check_prompts
from sarsteer_export.range_guard import check_range
from sarsteer_export.staging import check_output, staged_directory
from sarsteer_export.twin import executable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.lalm import Lalm
    from calibration.states import Progress
    from sarsteer_export.building.settings import BuildSettings
    from sarsteer_export.judges.judge import Judge


def build(
    model: str | Path, output: str | Path, settings: BuildSettings, *, progress: Progress | None = None
) -> BuildResult:
    """Calibrate, export, check the export, patch, prove, build engines and prove them, and write a bundle.

    Raises `InputError` for bad input, `SiteNotFoundError` when there is no residual stream to steer,
    `EngineError` when an engine cannot be built, `ParityError` when the decoder or an engine that can be run here
    does not do what the steered eager model does; nothing is written then.
    """
    target = Path(output)
    inputs = read_inputs(Path(model), settings)
    earlier = earlier_bundle(target)
    reusable = reusable_stages(target, earlier, inputs)
    if earlier is not None and "verify" in reusable:
        check_known_range(target, reusable, settings)
        return up_to_date(target, earlier)
    check_output(target, overwrite=settings.overwrite)
    check_space(target, needed_bytes(inputs.model, settings))
    with staged_directory(target, overwrite=settings.overwrite) as folder:
        judge = settings.judge.open(device=settings.device) if inputs.evaluation else None
        lalm = settings.loading.load(inputs.model, device=settings.device, dtype=settings.dtype)
        inputs = inputs.checked(lambda request: check_clip(lalm, request), settings.calibration.data.on_error)
        check_prompts_fit(lalm, inputs, settings)
        write_frontend(lalm, folder)
        plan = (
            SteeringPlan.load(target / PLAN)
            if settings.plan is None and "calibrate" in reusable
            else make_plan(lalm, inputs, settings, unfinished_of(target), progress)
        )
        (folder / PLAN).parent.mkdir()
        plan.save(folder / PLAN)
        UnfinishedFile(unfinished_of(target), {}).remove()
        if earlier is not None and "export" in reusable:
            copy_export(target, earlier, folder)
            missing = earlier.missing
        else:
            missing = export_components(lalm, folder, progress)
        missing |= missing_frontend(lalm)
        if missing and inputs.evaluation:
            raise UnsupportedError(
                "behaviour cannot be measured on a bundle that hears nothing: "
                + "; ".join(f"{name}: {reason}" for name, reason in missing.items())
                + "; leave out --eval-harmful and --eval-benign"
            )
        patched = patch_model(read_graph(folder / UNSTEERED_DECODER), plan, force=settings.force)
        check_range(plan, patched.model, allow_overflow=settings.allow_overflow)
        write_graph(patched.model, folder / STEERED_DECODER)
        manifest = describe(lalm, plan, patched, inputs, folder, missing)
        manifest.write(folder)
        report, behaviour = prove(folder, lalm, plan, inputs, settings, judge, progress)
        kept = () if earlier is None else earlier.engines
        standing = {entry.backend: entry for entry in kept if engine_stage(entry.backend) in reusable}
        engines = tuple(
            copy_engine(target, standing[backend.name], folder)
            if backend.name in standing
            else add_engine(folder, backend, settings.engine, longest=inputs.longest, progress=progress)
            for backend in settings.engine.backends
        )
        dataclasses.replace(manifest, engines=engines).write(folder)
        chosen = parity_requests(inputs.harmful, inputs.benign, count=settings.parity.prompts)
        run = ParityRun(lalm, plan, chosen, settings.parity, progress)
        proven = [prove_engine(run, folder, entry) for entry in engines]
        check_verdicts(report, proven)
        measured = [
            (entry, measure_engine(folder, entry, lalm, plan, inputs, settings, judge, progress))
            for entry, judged in proven
            if judge is not None and judged.verdict is Verdict.PASSED
        ]
        manifest = finish(folder, manifest, report, proven, behaviour, measured, inputs, settings)
    measured_on_graphs = None if behaviour is None else with_table(behaviour, inputs, settings)
    return BuildResult(
        path=target,
        parity=report.to_json(),
        parity_table=report.table(),
        behaviour=measured_on_graphs,
        behaviour_table=None if measured_on_graphs is None else measured_on_graphs["table"],
        engines=manifest.engines,
        engine_behaviour={entry.label: with_table(found, inputs, settings) for entry, found in measured},
        reused=reusable,
        data=data_counts(plan, measured_on_graphs),
    )


def check_prompts_fit(lalm: Lalm, inputs: BuildInputs, settings: BuildSettings) -> None:
    """Refuse prompts that the engines' profiles do not admit, before anything is built.

    Also where the engines cannot be run: who runs them asks the same. Raises `InputError` naming the longest.
    """
    engine = settings.engine
    if inputs.decoder is None or not any(row.runtime is Runtime.TENSORRT for row in engine.backends):
        return
    profiles = engine.decoder_profiles(inputs.decoder, inputs.longest)
    chosen = parity_requests(inputs.harmful, inputs.benign, count=settings.parity.prompts)
    rows = min(BATCH_SIZE, engine.max_batch)
    asked = [Asked(chosen, len(chosen), max(settings.parity.decode_steps, ROLLOUT_TOKENS - 1))]
    asked += [Asked(requests, rows, settings.max_new_tokens - 1) for requests in inputs.evaluation.values()]
    check_prompts(lalm, asked, inputs.decoder, profiles)


def make_plan(
    lalm: Lalm, inputs: BuildInputs, settings: BuildSettings, unfinished: Path, progress: Progress | None
) -> SteeringPlan:
    """Load the plan that was given, or calibrate one; interrupted, it is gone on with from `unfinished`."""
    if settings.plan is not None:
        plan = SteeringPlan.load(settings.plan)
        parts = lalm.parts
        check_plan_fits(
            plan,
            hidden_size=parts.hidden_size,
            num_layers=len(parts.blocks),
            fingerprint=lalm.fingerprint,
            force=settings.force,
        )
        return plan
    sets = inputs.calibration
    run = CalibrationRun(unfinished=unfinished, resume=settings.resume)
    return calibrate(lalm, sets["harmful"], sets["benign"], settings.calibration, progress=progress, run=run)


def export_components(lalm: Lalm, folder: Path, progress: Progress | None) -> dict[str, str]:
    """Export the model into a bundle folder; its decoder is the unsteered one. What is missing, with reasons."""
    exported = export(lalm, folder / ONNX_FOLDER, progress=progress)
    exported.decoder.rename(folder / UNSTEERED_DECODER)
    return dict(exported.missing)


def prove(
    folder: Path,
    lalm: Lalm,
    plan: SteeringPlan,
    inputs: BuildInputs,
    settings: BuildSettings,
    judge: Judge | None,
    progress: Progress | None,
) -> tuple[ParityReport, BehaviourReport | None]:
    """Parity of a bundle folder's graphs on the CPU and, when there is somebody to judge it, behaviour.

    Raises `ParityError` when even the unsteered decoder disagrees with the eager model.
    """
    chosen = parity_requests(inputs.harmful, inputs.benign, count=settings.parity.prompts)
    with executable(folder, lalm, plan, scratch=folder.parent) as given:
        parity = dataclasses.replace(settings.parity, precision=given.precision)
        run = ParityRun(given.lalm, given.plan, chosen, parity, progress)
        exported = run.check_export(given.folder / UNSTEERED_DECODER)
        with Bundle(given.folder) as bundle:
            around = run.check_around_decoder(bundle)
            report = given.labelled(run.check_steering(exported, given.folder / STEERED_DECODER, around))
            behaviour = None
            if judge is not None:
                behaviour = measure_behaviour(
                    given.lalm,
                    bundle,
                    given.plan,
                    inputs.evaluation,
                    judge,
                    max_new_tokens=settings.max_new_tokens,
                    engine_name=given.engine_name,
                    progress=progress,
                )
    return report, behaviour


def check_verdicts(report: ParityReport, proven: Sequence[tuple[EngineEntry, ParityReport]]) -> None:
    """Raise `ParityError` unless the verdict on the graphs is passed and none on an engine is failed."""
    _check_verdict("the steered engine", report, Verdict.PASSED)
    for entry, judged in proven:
        _check_verdict(f"the {entry.label} engine", judged, Verdict.PASSED, Verdict.NOT_EXECUTED)


def measure_engine(
    folder: Path,
    entry: EngineEntry,
    lalm: Lalm,
    plan: SteeringPlan,
    inputs: BuildInputs,
    settings: BuildSettings,
    judge: Judge,
    progress: Progress | None,
) -> BehaviourReport:
    """Behaviour on an engine of a bundle folder that this machine runs."""
    rows = rows_of(folder, entry)
    with Bundle(folder, engine=entry.backend) as bundle:
        return measure_behaviour(
            lalm,
            bundle,
            plan,
            inputs.evaluation,
            judge,
            max_new_tokens=settings.max_new_tokens,
            batch_size=BATCH_SIZE if rows is None else min(BATCH_SIZE, rows),
            engine_name=entry.backend,
            progress=progress,
        )


def _check_verdict(engine: str, report: ParityReport, *good: Verdict) -> None:
    if report.verdict not in good:
        raise ParityError(
            f"parity of {engine} with the steered eager model failed; nothing was written:\n  "
            + "\n  ".join(report.failures())
        )
