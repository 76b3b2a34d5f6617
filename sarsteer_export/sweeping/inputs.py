"""What a sweep is made from: the model and four sets of requests, read and checked before anything takes long."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from calibration.calibrate import calibration_provenance, calibration_set
from calibration.checkpoint import hears_audio, processor_digest, read_config
from calibration.clips import Clips
from calibration.directions import largest_rank
from calibration.errors import InputError
from calibration.overlap import Overlap, check_disjoint, check_kinds
from calibration.requests import RequestSet, check_benign_count
from calibration.states import check_clip
from sarsteer_export.evaluation.figures import BENIGN, HARMFUL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from calibration.lalm import Lalm
    from calibration.requests import SpokenRequest
    from sarsteer_export.sweeping.grid import Grid
    from sarsteer_export.sweeping.settings import SweepSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepInputs:
    """The model, and what it hears: `calibration` and `held_out` requests by kind, and what they share."""

    lalm: Lalm
    clips: Clips
    calibration: dict[str, RequestSet]
    held_out: dict[str, RequestSet]
    overlap: Overlap

    @property
    def calibrated_on(self) -> tuple[SpokenRequest, ...]:
        """The requests of both kinds to calibrate on."""
        return tuple(request for found in self.calibration.values() for request in found.requests)

    @property
    def asked(self) -> dict[str, Sequence[SpokenRequest]]:
        """The requests to choose by."""
        return {kind: found.requests for kind, found in self.held_out.items()}


def read_inputs(model: Path, settings: SweepSettings) -> SweepInputs:
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
    lalm = settings.loading.load(
        model, device=settings.device, dtype=settings.dtype, device_map=settings.device_map
    )
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
    return SweepInputs(lalm, clips, checked["calibration"], checked["held_out"], overlap)


def fitted(grid: Grid, inputs: SweepInputs) -> Grid:
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


def depends_on(inputs: SweepInputs, settings: SweepSettings) -> dict[str, Any]:
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
        "device": settings.device if settings.device_map is None else settings.device_map,
    }
