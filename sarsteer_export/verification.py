"""`verify`: parity again, from a bundle and the checkpoint it was made from."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.lalm import Lalm
from calibration.model_options import ModelOptions, check_driven_alike
from calibration.plan import SteeringPlan, check_plan_fits
from calibration.records import ReadSettings, check_audio_file
from calibration.requests import read_request_set
from calibration.states import check_clip
from engines.backends import CPU_BACKEND, find_backend
from engines.opening import check_can_run
from graph_passes.float32_twin import write_float32_twins
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import PLAN, STEERED_DECODER, UNSTEERED_DECODER, Manifest
from sarsteer_export.bundle_engines import prove_engine
from sarsteer_export.exporting.export import export
from sarsteer_export.parity_run import ParityRun, ParitySettings, parity_requests
from sarsteer_export.twin import executable

if TYPE_CHECKING:
    from calibration.states import Progress
    from engines.report import ParityReport


def verify(
    bundle: str | Path,
    model: str | Path | Lalm,
    requests: str | Path,
    settings: ParitySettings | None = None,
    *,
    loading: ModelOptions | None = None,
    data: ReadSettings | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Run parity again from a bundle, the checkpoint it was made from and requests in any format of `docs/data.md`.

    `settings.backend`: what is compared, the bundle's graphs on ONNX Runtime's CPU provider or one of its engines.
    `data`: how the requests are read; the first `settings.prompts` are compared on.
    Returns the report whatever its verdict on the steered engine. Raises `ParityError` when the unsteered
    decoder itself disagrees with the model, `InputError` when the bundle was altered or made from another
    checkpoint, `UnsupportedError` when the backend cannot run here.
    """
    settings = settings or ParitySettings()
    folder = Path(bundle)
    backend = find_backend(settings.backend)
    check_can_run(backend)
    data = data or ReadSettings()
    asked = read_request_set(requests, settings=data)
    asked = dataclasses.replace(asked, requests=parity_requests(asked.requests, count=settings.prompts))
    asked = asked.checked(check_audio_file, data.on_error)
    manifest = Manifest.read(folder)
    manifest.check_hashes(folder)
    plan = SteeringPlan.load(folder / PLAN)
    dtype = manifest.model["dtype"]
    lalm = model if isinstance(model, Lalm) else (loading or ModelOptions()).load(model, dtype=dtype)
    if lalm.fingerprint != manifest.model["fingerprint"]:
        raise InputError(
            f"the bundle was made from another checkpoint: its fingerprint is "
            f"{manifest.model['fingerprint'][:12]}, this one's is {lalm.fingerprint[:12]}"
        )
    check_driven_alike(manifest.model.get("driven_by"), lalm)
    parts = lalm.parts
    check_plan_fits(plan, hidden_size=parts.hidden_size, num_layers=len(parts.blocks))
    chosen = asked.checked(lambda request: check_clip(lalm, request), data.on_error).requests
    with ExitStack() as stack:
        if backend is not CPU_BACKEND:
            entry = manifest.engine(backend.name)
            run = ParityRun(lalm, plan, chosen, dataclasses.replace(settings, precision=dtype), progress)
            return prove_engine(run, folder, entry, _unsteered(folder, lalm, stack))[1]
        given = stack.enter_context(executable(folder, lalm, plan))
        parity = dataclasses.replace(settings, precision=given.precision)
        run = ParityRun(given.lalm, given.plan, chosen, parity, progress)
        opened = stack.enter_context(Bundle(given.folder))
        around = run.check_around_decoder(opened)
        unsteered = _unsteered(given.folder, lalm, stack)
        if given.is_twin and not opened.has_unsteered:
            unsteered = _twin_of(unsteered, stack)
        exported = run.check_export(unsteered)
        return given.labelled(run.check_steering(exported, given.folder / STEERED_DECODER, around))


def _unsteered(folder: Path, lalm: Lalm, stack: ExitStack) -> Path:
    """The bundle's unsteered decoder, or one that is exported again, for as long as `stack` is open."""
    if (folder / UNSTEERED_DECODER).is_file():
        return folder / UNSTEERED_DECODER
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    return export(lalm, Path(scratch) / "onnx").decoder


def _twin_of(decoder: Path, stack: ExitStack) -> Path:
    """The float32 twin of a decoder, while `stack` is open; a float32 export names its tensors otherwise."""
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_float32_twins([decoder], scratch)
    return scratch / decoder.name
