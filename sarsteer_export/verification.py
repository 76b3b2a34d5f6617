"""`verify`: parity again, from a bundle and the checkpoint it was made from."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.lalm import Lalm, load_lalm
from calibration.plan import check_plan_fits
from calibration.requests import read_requests
from calibration.states import check_clips
from engines.backends import CPU_BACKEND, find_backend
from engines.opening import check_can_run
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import STEERED_DECODER, UNSTEERED_DECODER
from sarsteer_export.bundle_engines import prove_engine
from sarsteer_export.exporting.export import export
from sarsteer_export.parity_run import ParityRun, ParitySettings, parity_requests

if TYPE_CHECKING:
    from calibration.states import Progress
    from engines.report import ParityReport


def verify(
    bundle: str | Path,
    model: str | Path | Lalm,
    requests: str | Path,
    settings: ParitySettings | None = None,
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """Run parity again from a bundle, the checkpoint it was made from and a JSON Lines file of requests.

    `settings.backend`: what is compared, the bundle's graphs on ONNX Runtime's CPU provider or one of its engines.
    Returns the report whatever its verdict on the steered engine. Raises `ParityError` when the unsteered
    decoder itself disagrees with the model, `InputError` when the bundle was altered or made from another
    checkpoint, `UnsupportedError` when the backend cannot run here.
    """
    settings = settings or ParitySettings()
    folder = Path(bundle)
    backend = find_backend(settings.backend)
    check_can_run(backend)
    chosen = parity_requests(read_requests(requests), count=settings.prompts)
    with Bundle(folder) as opened:
        opened.manifest.check_hashes(folder)
        plan = opened.plan
        settings = dataclasses.replace(settings, precision=opened.manifest.model["dtype"])
        lalm = model if isinstance(model, Lalm) else load_lalm(model, dtype=opened.manifest.model["dtype"])
        if lalm.fingerprint != opened.manifest.model["fingerprint"]:
            raise InputError(
                f"the bundle was made from another checkpoint: its fingerprint is "
                f"{opened.manifest.model['fingerprint'][:12]}, this one's is {lalm.fingerprint[:12]}"
            )
        parts = lalm.parts
        check_plan_fits(plan, hidden_size=parts.hidden_size, num_layers=len(parts.blocks))
        check_clips(lalm, chosen)
        run = ParityRun(lalm, plan, chosen, settings, progress)
        unsteered = folder / UNSTEERED_DECODER
        with ExitStack() as stack:
            if not unsteered.is_file():
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                unsteered = export(lalm, Path(scratch) / "onnx").decoder
            if backend is not CPU_BACKEND:
                entry = opened.manifest.engine(backend.name)
                return prove_engine(run, folder, entry, unsteered)[1]
            around = run.check_around_decoder(opened)
            return run.check_steering(run.check_export(unsteered), folder / STEERED_DECODER, around)
