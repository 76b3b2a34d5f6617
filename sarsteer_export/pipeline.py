"""`build`: from spoken requests and a checkpoint to a proven bundle, step by step.

Each step is a typed function; `build` reads as the pipeline. Everything is written to a staging folder that
becomes the bundle when the last step has passed. Steps whose inputs are those of the bundle that already
stands at the output are taken from it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.calibrate import CalibrationRun, calibrate, unfinished_of
from calibration.checkpoint import parameter_count
from calibration.errors import InputError, ParityError, UnsupportedError
from calibration.model_options import driven_by
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.states import check_clip
from calibration.unfinished import UnfinishedFile
from engines.backends import Runtime
from engines.report import ParityReport, Verdict
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import PatchResult, patch_model
from sarsteer_export.around_decoder import ROLLOUT_TOKENS
from sarsteer_export.behaviour import BATCH_SIZE, BehaviourReport, measure_behaviour
from sarsteer_export.build_inputs import (
    BYTES_PER_PARAMETER,
    PACKAGES,
    BuildInputs,
    BuildSettings,
    engine_stage,
    read_inputs,
)
from sarsteer_export.build_reuse import copy_engine, copy_export, earlier_bundle, reusable_stages
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import (
    BEHAVIOUR_REPORT,
    COMPONENTS,
    FRONTEND,
    MANIFEST,
    ONNX_FOLDER,
    PARITY_PAGE,
    PARITY_REPORT,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    EngineEntry,
    Manifest,
    describe_files,
)
from sarsteer_export.bundle_engines import add_engine, prove_engine, rows_of
from sarsteer_export.bundle_frontend import frontend_of, missing_frontend, write_frontend
from sarsteer_export.exporting.export import export
from sarsteer_export.parity_run import ParityRun, parity_requests
from sarsteer_export.prompt_lengths import Asked, check_prompts
from sarsteer_export.range_guard import check_range
from sarsteer_export.report_page import parity_page
from sarsteer_export.staging import check_output, nearest_folder, staged_directory
from sarsteer_export.twin import executable
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.lalm import Lalm
    from calibration.states import Progress
    from sarsteer_export.judges.judge import Judge


BYTES_BESIDE_WEIGHTS = 2_000_000
"""Graphs, tokenizer and reports of a small model's bundle; a 7B's are some megabytes more."""
BYTES_BESIDE_ENGINE_WEIGHTS = 12_000_000
"""What an engine of TensorRT-RTX holds beside its weights, its kernels: `benchmarks/engine_build.py` shows its size."""
MEMORY_PER_PARAMETER = {"float32": 12, "float16": 6, "bfloat16": 14}
"""Bytes held at once at the peak: the eager model, the traced program and a runtime session; in bfloat16 the model,
its copy in float32 and two sessions of the float32 twin."""


@dataclass(frozen=True)
class BuildPreview:
    """What a build would do: steps with their fate, and estimates of what it needs."""

    steps: tuple[tuple[str, str], ...]
    parameters: int
    disk_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, its reports as JSON, its engines, and the stages taken from an earlier build.

    `engine_behaviour`: behaviour on every engine that it was measured on, by the engine's label; each report holds
    its table. `data`: what was calibrated on and what was held out, by kind, counted.
    """

    path: Path
    parity: dict[str, Any]
    parity_table: str
    behaviour: dict[str, Any] | None
    behaviour_table: str | None
    engines: tuple[EngineEntry, ...]
    engine_behaviour: dict[str, dict[str, Any]]
    reused: tuple[str, ...]
    data: dict[str, dict[str, Any]]


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
        return _up_to_date(target, earlier)
    check_output(target, overwrite=settings.overwrite)
    _check_space(target, _needed_bytes(inputs.model, settings))
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
    measured_on_graphs = None if behaviour is None else _with_table(behaviour, inputs, settings)
    return BuildResult(
        path=target,
        parity=report.to_json(),
        parity_table=report.table(),
        behaviour=measured_on_graphs,
        behaviour_table=None if measured_on_graphs is None else measured_on_graphs["table"],
        engines=manifest.engines,
        engine_behaviour={entry.label: _with_table(found, inputs, settings) for entry, found in measured},
        reused=reusable,
        data=_data_counts(plan, measured_on_graphs),
    )


def preview(model: str | Path, output: str | Path, settings: BuildSettings) -> BuildPreview:
    """Say what `build` would do and need, and write nothing.

    Raises what bad input would raise, as far as it shows without loading the model: samples are not read.
    """
    target = Path(output)
    inputs = read_inputs(Path(model), settings)
    earlier = earlier_bundle(target)
    parameters = parameter_count(inputs.model)
    disk = _disk_bytes(inputs.model, settings)
    reusable = reusable_stages(target, earlier, inputs)
    check_known_range(target, reusable, settings)
    if "verify" in reusable:
        steps = [(stage, "up to date") for stage in inputs.stages]
    else:
        check_output(target, overwrite=settings.overwrite)
        _check_space(target, _needed_bytes(inputs.model, settings))
        steps = [(stage, "reused" if stage in reusable else "run") for stage in inputs.stages]
    memory = parameters * MEMORY_PER_PARAMETER[settings.dtype]
    return BuildPreview(tuple(steps), parameters, disk, memory)


def check_known_range(target: Path, reusable: Sequence[str], settings: BuildSettings) -> None:
    """Hold the guard against what a build takes from the bundle at its output, as far as that has plan and graph.

    Whether an overflow was allowed then says nothing of now. Raises `InputError` as `check_range` does.
    """
    if settings.plan is not None:
        plan = settings.plan
    elif "calibrate" in reusable:
        plan = target / PLAN
    else:
        return
    if "verify" in reusable:
        decoder = STEERED_DECODER
    elif "export" in reusable:
        decoder = UNSTEERED_DECODER
    else:
        return
    check_range(SteeringPlan.load(plan), read_graph(target / decoder), allow_overflow=settings.allow_overflow)


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


def describe(
    lalm: Lalm,
    plan: SteeringPlan,
    patched: PatchResult,
    inputs: BuildInputs,
    folder: Path,
    missing: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a bundle folder, before it was proven; `missing`: what is not in it, with reasons."""
    driven = driven_by(lalm)
    graphs = {}
    for file in COMPONENTS.values():
        if not (folder / file).exists():
            continue
        graph = read_graph(folder / file)
        graphs[file.as_posix()] = {
            "inputs": [dataclasses.asdict(port) for port in graph_inputs(graph)],
            "outputs": [dataclasses.asdict(port) for port in graph_outputs(graph)],
        }
    return Manifest(
        versions=installed_versions(*PACKAGES),
        model={
            "class": type(lalm.model).__name__,
            "fingerprint": lalm.fingerprint,
            "dtype": str(lalm.model.dtype).removeprefix("torch."),
            **({} if driven is None else {"driven_by": driven}),
            FRONTEND: frontend_of(lalm),
            "adapter": lalm.adapter_type.__name__,
            "missing": missing or {},
        },
        tokens={
            "audio": lalm.adapter.audio_token_id,
            "end": list(lalm.adapter.end_token_ids),
            "pad": lalm.adapter.pad_token_id,
        },
        graphs=graphs,
        plan_sha256=plan.digest(),
        edits=[dataclasses.asdict(edit) for edit in patched.edits],
        parity={"verdict": None},
        stages=inputs.stages,
        files={},
    )


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


def finish(
    folder: Path,
    manifest: Manifest,
    report: ParityReport,
    proven: Sequence[tuple[EngineEntry, ParityReport]],
    behaviour: BehaviourReport | None,
    measured: Sequence[tuple[EngineEntry, BehaviourReport]],
    inputs: BuildInputs,
    settings: BuildSettings,
) -> Manifest:
    """Write the reports and the final manifest."""
    _write_parity(folder / PARITY_REPORT, report)
    for entry, judged in proven:
        _write_parity(folder / entry.report, judged)
    if behaviour is not None:
        _write_json(folder / BEHAVIOUR_REPORT, _with_table(behaviour, inputs, settings))
    for entry, found in measured:
        _write_json(folder / entry.behaviour, _with_table(found, inputs, settings))
    if not settings.keep_unsteered:
        (folder / UNSTEERED_DECODER).unlink()
    parity = {"verdict": report.verdict.value, "backend": report.backend, "precision": report.precision}
    (folder / MANIFEST).unlink()
    engines = tuple(entry for entry, _ in proven)
    final = dataclasses.replace(manifest, parity=parity, engines=engines, files=describe_files(folder))
    final.write(folder)
    return final


def _check_verdict(engine: str, report: ParityReport, *good: Verdict) -> None:
    if report.verdict not in good:
        raise ParityError(
            f"parity of {engine} with the steered eager model failed; nothing was written:\n  "
            + "\n  ".join(report.failures())
        )


def _data_counts(plan: SteeringPlan, behaviour: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What a plan says of its calibration sets, and what a report on behaviour says of those held out."""
    known = {kind: plan.provenance[kind] for kind in ("harmful", "benign") if kind in plan.provenance}
    held_out = {} if behaviour is None else behaviour.get("held_out", {})
    return known | {f"eval_{kind}": counts for kind, counts in held_out.items()}


def _with_table(report: BehaviourReport, inputs: BuildInputs, settings: BuildSettings) -> dict[str, Any]:
    """A report on behaviour as JSON; it says who judged, what was skipped, and how many requests were no new ones."""
    table, overlap = report.table(), inputs.overlap
    if any(overlap.counts.values()):
        table += f"\nrequests that calibration saw: {overlap.text()}, which was allowed"
    return report.to_json() | {
        "held_out": inputs.held_out_counts,
        "overlap": overlap.counts,
        "judge": settings.judge.identity(),
        "table": table,
    }


def _write_parity(path: Path, report: ParityReport) -> None:
    path.parent.mkdir(exist_ok=True)
    _write_json(path, report.to_json() | {"table": report.table()})
    path.with_suffix(PARITY_PAGE.suffix).write_text(parity_page(report.to_json()), encoding="utf-8")


def _needed_bytes(model: Path, settings: BuildSettings) -> int:
    """About how much room a build takes at its peak: the bundle and, in bfloat16, its float32 twin."""
    twin = parameter_count(model) * BYTES_PER_PARAMETER["float32"] if settings.dtype == "bfloat16" else 0
    return _disk_bytes(model, settings) + twin


def _disk_bytes(model: Path, settings: BuildSettings) -> int:
    """About how large the bundle will be: the weights once for the graphs and once for every engine."""
    built = [row for row in settings.engine.backends if row.runtime is Runtime.TENSORRT]
    weights = parameter_count(model) * BYTES_PER_PARAMETER[settings.dtype]
    return weights + BYTES_BESIDE_WEIGHTS + len(built) * (weights + BYTES_BESIDE_ENGINE_WEIGHTS)


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(nearest_folder(target)).free
    if free < needed:
        raise InputError(
            f"{target}: building the bundle needs about {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there"
        )


def _up_to_date(target: Path, manifest: Manifest) -> BuildResult:
    parity = json.loads((target / PARITY_REPORT).read_text(encoding="utf-8"))
    behaviour = None
    if (target / BEHAVIOUR_REPORT).is_file():
        behaviour = json.loads((target / BEHAVIOUR_REPORT).read_text(encoding="utf-8"))
    return BuildResult(
        path=target,
        parity=parity,
        parity_table=parity["table"],
        behaviour=behaviour,
        behaviour_table=None if behaviour is None else behaviour["table"],
        engines=manifest.engines,
        engine_behaviour={
            entry.label: json.loads((target / entry.behaviour).read_text(encoding="utf-8"))
            for entry in manifest.engines
            if (target / entry.behaviour).is_file()
        },
        reused=tuple(manifest.stages),
        data=_data_counts(SteeringPlan.load(target / PLAN), behaviour),
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
