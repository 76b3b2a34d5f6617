"""`build`: from spoken requests and a checkpoint to a proven bundle, step by step.

Each step is a typed function; `build` reads as the pipeline. Everything is written to a staging folder that
becomes the bundle when the last step has passed. Steps whose inputs are those of the bundle that already
stands at the output are taken from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.calibrate import CalibrationSettings, calibrate
from calibration.checkpoint import fingerprint, parameter_count, read_config
from calibration.errors import InputError, ParityError
from calibration.lalm import Lalm, load_lalm
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.requests import SpokenRequest, read_requests, requests_digest
from engines.limits import limits_for
from engines.report import ParityReport, Verdict
from graph_passes.interface import graph_inputs, graph_outputs
from graph_passes.onnx_file import read_graph, write_graph
from graph_passes.patch import PatchResult, patch_model
from sarsteer_export.behaviour import BehaviourReport, Judge, measure_behaviour
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.frontend import check_extractor
from sarsteer_export.bundle.manifest import (
    AUDIO_ENCODER,
    BEHAVIOUR_REPORT,
    EMBED_TOKENS,
    MANIFEST,
    ONNX_FOLDER,
    PARITY_PAGE,
    PARITY_REPORT,
    PLAN,
    STEERED_DECODER,
    UNSTEERED_DECODER,
    Manifest,
    describe_files,
)
from sarsteer_export.exporting.export import OPSET, export
from sarsteer_export.report_page import parity_page
from sarsteer_export.staging import check_output, nearest_folder, staged_directory
from sarsteer_export.verification import (
    ParitySettings,
    compare_components,
    installed_versions,
    parity_requests,
    verify_export,
    verify_steering,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.states import Progress

logger = logging.getLogger(__name__)

BYTES_PER_PARAMETER = {"float32": 4, "float16": 2, "bfloat16": 2}
MEMORY_COPIES = 3
"""Copies of the weights held at once at the peak: the eager model, the traced program, a runtime session."""
PACKAGES = (
    "sarsteer-export",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "numpy",
)


@dataclass(frozen=True)
class BuildSettings:
    """Everything a build can be told.

    `plan`: a ready plan file; calibration is then skipped, and `harmful` and `benign` serve parity alone.
    `eval_harmful`, `eval_benign`: held-out requests to measure behaviour on, both or none.
    """

    harmful: Path
    benign: Path
    plan: Path | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    parity: ParitySettings = field(default_factory=ParitySettings)
    eval_harmful: Path | None = None
    eval_benign: Path | None = None
    judge: Judge = field(default_factory=Judge)
    max_new_tokens: int = 32
    keep_unsteered: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    force: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.eval_harmful is None) != (self.eval_benign is None):
            raise InputError("behaviour needs both --eval-harmful and --eval-benign; only one was given")
        if self.dtype not in BYTES_PER_PARAMETER:
            raise InputError(f"dtype is {self.dtype!r}; expected one of {', '.join(BYTES_PER_PARAMETER)}")
        object.__setattr__(self, "parity", dataclasses.replace(self.parity, precision=self.dtype))
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        limits_for(self.parity.backend, self.dtype)  # what cannot be proven is refused before it is built


@dataclass(frozen=True)
class BuildInputs:
    """The inputs of a build, read and identified: what the stage keys are made of."""

    model: Path
    fingerprint: str
    harmful: tuple[SpokenRequest, ...]
    benign: tuple[SpokenRequest, ...]
    evaluation: dict[str, Sequence[SpokenRequest]]
    stages: dict[str, str]


@dataclass(frozen=True)
class BuildPreview:
    """What a build would do: steps with their fate, and estimates of what it needs."""

    steps: tuple[tuple[str, str], ...]
    parameters: int
    disk_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, its reports as JSON, and the stages that were taken from an earlier build."""

    path: Path
    parity: dict[str, Any]
    parity_table: str
    behaviour: dict[str, Any] | None
    behaviour_table: str | None
    reused: tuple[str, ...]


def build(
    model: str | Path, output: str | Path, settings: BuildSettings, *, progress: Progress | None = None
) -> BuildResult:
    """Calibrate, export, check the export, patch, prove, and write a bundle to `output`.

    Raises `InputError` for bad input, `SiteNotFoundError` when there is no residual stream to steer,
    `ParityError` when the engine does not do what the steered eager model does; nothing is written then.
    """
    target = Path(output)
    inputs = read_inputs(Path(model), settings)
    earlier = _earlier(target)
    reusable = _reusable(target, earlier, inputs)
    if earlier is not None and "verify" in reusable:
        return _up_to_date(target, earlier)
    check_output(target, overwrite=settings.overwrite)
    _check_space(target, inputs.model, settings)
    with staged_directory(target, overwrite=settings.overwrite) as folder:
        lalm = load_lalm(inputs.model, device=settings.device, dtype=settings.dtype)
        _write_frontend(lalm, folder)
        plan = (
            SteeringPlan.load(target / PLAN)
            if "calibrate" in reusable
            else make_plan(lalm, settings, progress)
        )
        (folder / PLAN).parent.mkdir()
        plan.save(folder / PLAN)
        if earlier is not None and "export" in reusable:
            _copy_export(target, earlier, folder)
        else:
            export_components(lalm, folder, progress)
        requests = parity_requests(inputs.harmful, inputs.benign, count=settings.parity.prompts)
        exported = verify_export(lalm, plan, folder / UNSTEERED_DECODER, requests, settings.parity, progress)
        patched = patch_model(exported.unsteered, plan, force=settings.force)
        write_graph(patched.model, folder / STEERED_DECODER)
        manifest = describe(lalm, plan, patched, inputs, folder)
        manifest.write(folder)
        with Bundle(folder) as bundle:
            limits = limits_for(settings.parity.backend, settings.parity.precision)
            components = compare_components(lalm, bundle, requests, limits)
            report = verify_steering(
                exported, lalm, plan, folder / STEERED_DECODER, settings.parity, components, progress
            )
            behaviour = None
            if inputs.evaluation:
                behaviour = measure_behaviour(
                    lalm,
                    bundle,
                    plan,
                    inputs.evaluation,
                    settings.judge,
                    max_new_tokens=settings.max_new_tokens,
                    progress=progress,
                )
        finish(folder, manifest, report, behaviour, settings)
    return BuildResult(
        path=target,
        parity=report.to_json(),
        parity_table=report.table(),
        behaviour=None if behaviour is None else behaviour.to_json(),
        behaviour_table=None if behaviour is None else behaviour.table(),
        reused=reusable,
    )


def preview(model: str | Path, output: str | Path, settings: BuildSettings) -> BuildPreview:
    """Say what `build` would do and need, and write nothing. Raises what bad input would raise."""
    target = Path(output)
    inputs = read_inputs(Path(model), settings)
    earlier = _earlier(target)
    parameters = parameter_count(inputs.model)
    weights = parameters * BYTES_PER_PARAMETER[settings.dtype]
    reusable = _reusable(target, earlier, inputs)
    if "verify" in reusable:
        steps = [(stage, "up to date") for stage in inputs.stages]
    else:
        check_output(target, overwrite=settings.overwrite)
        steps = [(stage, "reused" if stage in reusable else "run") for stage in inputs.stages]
    return BuildPreview(tuple(steps), parameters, weights, MEMORY_COPIES * weights)


def read_inputs(model: Path, settings: BuildSettings) -> BuildInputs:
    """Read and check everything a build starts from, without loading the model."""
    read_config(model)
    identity = fingerprint(model)
    limit, seed = settings.calibration.limit, settings.calibration.seed
    harmful = read_requests(settings.harmful, limit=limit, seed=seed)
    benign = read_requests(settings.benign, limit=limit, seed=seed)
    evaluation: dict[str, Sequence[SpokenRequest]] = {}
    if settings.eval_harmful is not None and settings.eval_benign is not None:
        evaluation = {
            "harmful": read_requests(settings.eval_harmful),
            "benign": read_requests(settings.eval_benign),
        }
    versions = installed_versions(*PACKAGES)
    common = [identity, settings.dtype, versions]
    if settings.plan is not None:
        calibration: Any = SteeringPlan.load(settings.plan).digest()
    else:
        chosen = dataclasses.replace(settings.calibration, batch_size=1)
        calibration = [dataclasses.asdict(chosen), requests_digest(harmful), requests_digest(benign)]
    evaluated = [requests_digest(asked) for asked in evaluation.values()]
    stages = {"calibrate": _key(common, calibration), "export": _key(common, OPSET)}
    stages["verify"] = _key(
        stages,
        dataclasses.asdict(settings.parity),
        [requests_digest(harmful), requests_digest(benign)],
        evaluated,
        dataclasses.asdict(settings.judge),
        settings.max_new_tokens,
        settings.keep_unsteered,
    )
    return BuildInputs(model, identity, harmful, benign, evaluation, stages)


def make_plan(lalm: Lalm, settings: BuildSettings, progress: Progress | None) -> SteeringPlan:
    """Load the plan that was given, or calibrate one."""
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
    return calibrate(lalm, settings.harmful, settings.benign, settings.calibration, progress=progress)


def export_components(lalm: Lalm, folder: Path, progress: Progress | None) -> None:
    """Export the model into a bundle folder; its decoder is the unsteered one."""
    if progress is not None:
        progress("export", 0, 1)
    decoder = export(lalm, folder / ONNX_FOLDER).decoder
    decoder.rename(folder / UNSTEERED_DECODER)
    if progress is not None:
        progress("export", 1, 1)


def describe(
    lalm: Lalm, plan: SteeringPlan, patched: PatchResult, inputs: BuildInputs, folder: Path
) -> Manifest:
    """The manifest of a bundle folder, before it was proven."""
    config: Any = lalm.model.config
    generation: Any = lalm.model.generation_config
    end = generation.eos_token_id
    graphs = {}
    for file in (STEERED_DECODER, AUDIO_ENCODER, EMBED_TOKENS):
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
        },
        tokens={
            "audio": int(config.audio_token_id),
            "end": [end] if isinstance(end, int) else list(end or []),
            "pad": lalm.processor.tokenizer.pad_token_id,
        },
        graphs=graphs,
        plan_sha256=plan.digest(),
        edits=[dataclasses.asdict(edit) for edit in patched.edits],
        parity={"verdict": None},
        stages=inputs.stages,
        files={},
    )


def finish(
    folder: Path,
    manifest: Manifest,
    report: ParityReport,
    behaviour: BehaviourReport | None,
    settings: BuildSettings,
) -> None:
    """Write the reports and the final manifest. Raises `ParityError` unless the verdict is passed."""
    if report.verdict is not Verdict.PASSED:
        raise ParityError(
            "the engine does not do what the steered eager model does; nothing was written:\n  "
            + "\n  ".join(report.failures())
        )
    (folder / PARITY_REPORT).parent.mkdir()
    _write_json(folder / PARITY_REPORT, report.to_json() | {"table": report.table()})
    (folder / PARITY_PAGE).write_text(parity_page(report.to_json()), encoding="utf-8")
    if behaviour is not None:
        _write_json(folder / BEHAVIOUR_REPORT, behaviour.to_json() | {"table": behaviour.table()})
    if not settings.keep_unsteered:
        (folder / UNSTEERED_DECODER).unlink()
    parity = {"verdict": report.verdict.value, "backend": report.backend, "precision": report.precision}
    (folder / MANIFEST).unlink()
    dataclasses.replace(manifest, parity=parity, files=describe_files(folder)).write(folder)


def _write_frontend(lalm: Lalm, folder: Path) -> None:
    check_extractor(lalm.processor.feature_extractor.to_dict())
    lalm.processor.save_pretrained(folder)


def _check_space(target: Path, model: Path, settings: BuildSettings) -> None:
    needed = parameter_count(model) * BYTES_PER_PARAMETER[settings.dtype]
    free = shutil.disk_usage(nearest_folder(target)).free
    if free < needed:
        raise InputError(
            f"{target}: the bundle needs about {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free there"
        )


def _earlier(target: Path) -> Manifest | None:
    """The manifest of the bundle that stands at the output, if there is a sound one."""
    try:
        return Manifest.read(target)
    except InputError:
        return None


def _reusable(target: Path, earlier: Manifest | None, inputs: BuildInputs) -> tuple[str, ...]:
    """Stages of the bundle at the output whose inputs are the same and whose files are what they were."""
    if earlier is None:
        return ()
    exported = _exported_files(earlier)
    files = {"calibrate": [PLAN.as_posix()], "export": exported, "verify": list(earlier.files)}
    if UNSTEERED_DECODER.as_posix() not in exported:
        del files["export"]
    fresh = []
    for stage, names in files.items():
        if earlier.stages.get(stage) != inputs.stages[stage]:
            continue
        if (altered := earlier.altered(target, names)) is not None:
            logger.warning("%s: was altered since it was built; %s is not reused", target / altered, stage)
            continue
        fresh.append(stage)
    return tuple(fresh)


def _exported_files(manifest: Manifest) -> list[str]:
    """What `export` wrote into a bundle: everything in its ONNX folder but the steered decoder."""
    inside = f"{ONNX_FOLDER.as_posix()}/"
    return [name for name in manifest.files if name.startswith(inside) and name != STEERED_DECODER.as_posix()]


def _copy_export(target: Path, manifest: Manifest, folder: Path) -> None:
    for name in _exported_files(manifest):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target / name, folder / name)


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
        reused=tuple(manifest.stages),
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
