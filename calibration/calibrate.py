"""Calibration from end to end: a model and two sets of spoken requests in, a steering plan out."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoint import hears_audio, processor_digest, read_config
from calibration.clips import Clips
from calibration.collection import Collecting, Collection
from calibration.directions import SteeringSettings, largest_rank, steering_plan
from calibration.errors import InputError
from calibration.kept_prompts import KeptStore
from calibration.lalm import Lalm
from calibration.model_options import ModelOptions, driven_by
from calibration.overlap import SEEN, check_kinds, seen_digests
from calibration.processes import Processes
from calibration.records import ReadSettings, check_audio_file
from calibration.requests import RequestSet, check_benign_count, read_request_set
from calibration.unfinished import UnfinishedFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calibration.plan import SteeringPlan
    from calibration.states import Progress

REFUSAL_PROMPT = "I cannot assist with that."


@dataclass(frozen=True)
class CalibrationSettings:
    """Everything calibration can be told. The defaults are the paper's.

    `limit`: most requests of each kind; with more, `seed` picks the subset. `batch_size`: requests per
    forward pass; it does not change the result. `data`: how the requests are read.
    """

    steering: SteeringSettings = field(default_factory=SteeringSettings)
    refusal_prompt: str = REFUSAL_PROMPT
    limit: int | None = 100
    seed: int = 0
    batch_size: int = 16
    data: ReadSettings = field(default_factory=ReadSettings)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}; expected at least 1")
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; expected at least 1")


@dataclass(frozen=True)
class CalibrationRun:
    """Where and how a calibration runs; nothing of it is part of the result.

    `device_map`: how accelerate spreads a model that is loaded here over devices, instead of `device`. `unfinished`:
    file that keeps what an interrupted run found; with `resume`, one that is there is gone on from. `processes`:
    those that share the work.
    """

    device_map: str | dict[str, Any] | None = None
    unfinished: Path | None = None
    resume: bool = True
    processes: Processes = field(default_factory=Processes)


def unfinished_of(output: Path) -> Path:
    """Where a calibration whose plan goes to `output` is kept while it is unfinished: a hidden file beside it."""
    return output.with_name(f".{output.name}.unfinished")


def calibrate(
    model: str | Path | Lalm,
    harmful: str | Path | RequestSet,
    benign: str | Path | RequestSet,
    settings: CalibrationSettings | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    loading: ModelOptions | None = None,
    progress: Progress | None = None,
    run: CalibrationRun | None = None,
) -> SteeringPlan:
    """Compute the SARSteer plan of a model (METHOD: refusal direction, safe subspace, ablation).

    `model`: a checkpoint directory, loaded as `loading` says, or a model already loaded. `harmful`, `benign`: spoken
    requests in any format of `docs/data.md`, or read already. How large the residual stream gets, with and without
    the plan, goes into its provenance. Raises `InputError` for a bad model, bad requests, a clip that is in both
    sets or fewer than two benign ones, and where the stream overflows the model's dtype.
    """
    settings, run = settings or CalibrationSettings(), run or CalibrationRun()
    if not settings.refusal_prompt:
        raise InputError("the refusal prompt is empty; without it there is no refusal direction")
    hears = model.hears if isinstance(model, Lalm) else hears_audio(read_config(Path(model)))
    harmful_set, benign_set = (calibration_set(data, settings, hears=hears) for data in (harmful, benign))
    check_benign_count(benign_set.requests, benign_set.source)
    check_kinds(harmful_set.requests, benign_set.requests)
    if isinstance(model, Lalm):
        lalm = model
    else:
        device = run.processes.device(device)
        lalm = (loading or ModelOptions()).load(model, device=device, dtype=dtype, device_map=run.device_map)
    clips = Clips(lalm)
    harmful_set, benign_set = (
        clips.checked(data, settings.data.on_error) for data in (harmful_set, benign_set)
    )
    check_benign_count(benign_set.requests, benign_set.source)
    provenance = calibration_provenance(lalm, harmful_set, benign_set, settings)
    unfinished = None if run.unfinished is None else UnfinishedFile(run.unfinished, _key(lalm, provenance))
    how = Collecting(settings.batch_size, progress, unfinished, run.processes)
    with KeptStore.opened() as store:
        requests = (harmful_set.requests, benign_set.requests)
        collection = Collection(lalm, requests, settings.refusal_prompt, store, how, clips)
        collection.begin(resume=run.resume)
        statistics, unsteered = collection.collect()
        plan = steering_plan(statistics, settings.steering, provenance)
        largest = {"unsteered": unsteered, "steered": collection.steered_magnitudes(plan)}
    return replace(plan, provenance={**plan.provenance, "largest_magnitude": largest})


def _key(lalm: Lalm, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """All that the statistics depend on, of what goes into a plan's provenance; its strength and rank do not."""
    names = (
        "model_fingerprint",
        "model_dtype",
        "chat_template_sha256",
        "refusal_prompt",
        "harmful",
        "benign",
    )
    named = {name: provenance[name] for name in (*names, "versions")}
    driven = provenance.get("model_driven_by")
    return {**named, "processor": processor_digest(lalm.path), "model_driven_by": driven}


def calibration_set(
    data: str | Path | RequestSet, settings: CalibrationSettings, *, hears: bool = True
) -> RequestSet:
    """The requests to calibrate on, of which every clip is there and has a header that can be read.

    `hears`: whether the model takes audio; where it does not, records are text alone.
    """
    if isinstance(data, RequestSet):
        return data
    how = replace(settings.data, require_audio=hears)
    found = read_request_set(data, limit=settings.limit, seed=settings.seed, settings=how)
    return found.checked(check_audio_file, settings.data.on_error)


def calibration_provenance(
    lalm: Lalm,
    harmful: RequestSet,
    benign: RequestSet,
    settings: CalibrationSettings,
) -> dict[str, Any]:
    """What a plan was computed from, as JSON: model, data, prompts, settings and library versions."""
    steering = asdict(settings.steering)
    driven = driven_by(lalm)
    requests = (*harmful.requests, *benign.requests)
    return {
        "method": "SARSteer (arXiv 2510.17633)",
        "model": type(lalm.model).__name__,
        "model_id": lalm.path.resolve().name,
        "model_dtype": str(lalm.model.dtype).removeprefix("torch."),
        "model_fingerprint": lalm.fingerprint,
        **({} if driven is None else {"model_driven_by": driven}),
        "chat_template_sha256": hashlib.sha256(str(lalm.adapter.chat_template).encode()).hexdigest(),
        "refusal_prompt": settings.refusal_prompt,
        "prompts": sorted({request.text for request in requests})[:20],
        "harmful": harmful.summary(),
        "benign": benign.summary(),
        SEEN: seen_digests(requests),
        "alpha": steering["alpha"],
        "lambda": steering["ablation"],
        "rank": min(steering["rank"], largest_rank(len(benign.requests), lalm.parts.hidden_size)),
        "rank_requested": steering["rank"],
        "seed": settings.seed,
        "versions": {name: version(name) for name in ("sarsteer-export", "torch", "transformers", "numpy")},
    }
