"""What a build starts from: its inputs read and identified, and the keys of its stages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibration.calibrate import calibration_set
from calibration.checkpoint import (
    fingerprint,
    hears_audio,
    processor_digest,
    read_config,
)
from calibration.errors import InputError, UnsupportedError
from calibration.model_options import ModelOptions
from calibration.overlap import Overlap, check_disjoint, check_kinds, check_unseen
from calibration.plan import PositionKind, SteeringPlan, check_plan_fits
from calibration.records import check_audio_file
from calibration.requests import (
    ReadSettings,
    RequestSet,
    SpokenRequest,
    check_benign_count,
    read_request_set,
    requests_digest,
)
from engines.cuda_driver import cuda_driver
from engines.sidecar import Binding
from sarsteer_export.bundle_engines import check_engines
from sarsteer_export.exporting.contract import cache_input_names
from sarsteer_export.exporting.tracing import OPSET
from sarsteer_export.range_guard import PROVENANCE_KEY
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from calibration.records import OnError
    from sarsteer_export.building.settings import BuildSettings

PACKAGES = (
    "sarsteer-export",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)


@dataclass(frozen=True)
class BuildInputs:
    """The inputs of a build, read and identified: what the stage keys are made of.

    `calibration`, `held_out`: requests by kind, `harmful` and `benign`. `overlap`: what was held out in vain.
    `longest`: the most positions the model knows, `decoder`: the interface of its exported decoder, each where its
    configuration says.
    """

    model: Path
    fingerprint: str
    longest: int | None
    calibration: dict[str, RequestSet]
    held_out: dict[str, RequestSet]
    stages: dict[str, str]
    overlap: Overlap = field(default_factory=Overlap)
    decoder: tuple[Binding, ...] | None = None

    @property
    def harmful(self) -> tuple[SpokenRequest, ...]:
        """The harmful requests to calibrate on."""
        return self.calibration["harmful"].requests

    @property
    def benign(self) -> tuple[SpokenRequest, ...]:
        """The benign requests to calibrate on."""
        return self.calibration["benign"].requests

    @property
    def evaluation(self) -> dict[str, Sequence[SpokenRequest]]:
        """The requests that were held out, by kind; none where behaviour is not measured."""
        return {kind: found.requests for kind, found in self.held_out.items()}

    @property
    def held_out_counts(self) -> dict[str, dict[str, int]]:
        """How many requests of each kind were held out, and how many skipped."""
        return {
            kind: {"count": len(found.requests), "skipped": len(found.skipped)}
            for kind, found in self.held_out.items()
        }

    def checked(self, check: Callable[[SpokenRequest], object], on_error: OnError) -> BuildInputs:
        """The same without the requests that `check` refuses, as `RequestSet.checked` has it."""
        calibration, held_out = (
            {kind: found.checked(check, on_error) for kind, found in sets.items()}
            for sets in (self.calibration, self.held_out)
        )
        return dataclasses.replace(self, calibration=calibration, held_out=held_out)


def engine_stage(backend: str) -> str:
    """The stage that builds the engines of one backend."""
    return f"engine {backend}"


def read_inputs(model: Path, settings: BuildSettings) -> BuildInputs:
    """Read and check what a build starts from, as far as that goes without loading the model."""
    config = read_config(model)
    # A model loaded otherwise hears or not as its adapter, or its own code, says.
    hears = hears_audio(config) or settings.loading != ModelOptions()
    identity = fingerprint(model)
    chosen = settings.calibration
    how = dataclasses.replace(chosen.data, require_audio=hears)
    calibration_sets = {
        kind: calibration_set(data, chosen, hears=hears)
        for kind, data in (("harmful", settings.harmful), ("benign", settings.benign))
    }
    harmful, benign = (found.requests for found in calibration_sets.values())
    held_out: dict[str, RequestSet] = {}
    if settings.eval_harmful is not None and settings.eval_benign is not None:
        held_out = {
            kind: read_request_set(data, settings=how).checked(check_audio_file, chosen.data.on_error)
            for kind, data in (("harmful", settings.eval_harmful), ("benign", settings.eval_benign))
        }
    tested = [request for found in held_out.values() for request in found.requests]
    if settings.plan is None:
        check_benign_count(benign, settings.benign)
        check_kinds(harmful, benign)
        overlap = check_disjoint((*harmful, *benign), tested, settings.allow_overlap)
    common: list[Any] = [
        identity,
        processor_digest(model),
        settings.loading.identity(model),
        settings.dtype,
        installed_versions(*PACKAGES),
    ]
    magnitudes: Any = None
    if settings.plan is not None:
        plan = SteeringPlan.load(settings.plan)
        _check_plan_fits_config(plan, config, identity, force=settings.force)
        _check_positions(plan)
        overlap = check_unseen(plan, tested, settings.allow_overlap) if tested else Overlap()
        calibration: Any = plan.digest()
        magnitudes = plan.provenance.get(
            PROVENANCE_KEY
        )  # no part of the digest, and what the guard is held to
    else:
        computed = dataclasses.replace(chosen, batch_size=1, data=ReadSettings())
        calibration = [dataclasses.asdict(computed), requests_digest(harmful), requests_digest(benign)]
    evaluated = [requests_digest(found.requests) for found in held_out.values()]
    stages = {"calibrate": _key(common, calibration), "export": _key(common, OPSET)}
    if settings.engine.engines:
        _check_profiles(settings, config)
        check_engines(settings.engine, settings.dtype)
        common = [
            dataclasses.asdict(dataclasses.replace(settings.engine, engines=())),
            [gpu.compute_capability for gpu in cuda_driver().gpus],
        ]
        keys = {
            engine_stage(backend.name): _key(stages, common, backend.version())
            for backend in settings.engine.backends
        }
        stages |= keys
    stages["verify"] = _key(
        stages,
        dataclasses.asdict(settings.parity),
        [requests_digest(harmful), requests_digest(benign)],
        evaluated,
        settings.judge.identity() if evaluated else None,
        settings.max_new_tokens,
        settings.keep_unsteered,
        magnitudes,
    )
    return BuildInputs(
        model=model,
        fingerprint=identity,
        longest=_longest(config),
        calibration=calibration_sets,
        held_out=held_out,
        stages=stages,
        overlap=overlap,
        decoder=_decoder_inputs(config),
    )


def _check_positions(plan: SteeringPlan) -> None:
    """Raise `UnsupportedError` for positions that a bundle's decoder, which is told no prompt lengths, cannot find."""
    for number, edit in enumerate(plan.edits):
        if edit.positions.kind is PositionKind.FIRST:
            raise UnsupportedError(
                f"edit {number} of the plan acts at {edit.positions.value!r}; what drives a bundle does not tell its "
                "decoder where prompts end; export the model and steer the decoder with `patch --prompt-from input`"
            )


def _check_profiles(settings: BuildSettings, config: dict[str, Any]) -> None:
    """Refuse shapes that contradict each other, the decoder's interface or parity, before anything is run.

    Where the configuration does not say all sizes, what is left is found when the engine is built.
    """
    engine, longest = settings.engine, _longest(config)
    engine.limits(longest)
    inputs = _decoder_inputs(config)
    rows = engine.max_batch
    if inputs is not None:
        profiles = engine.decoder_profiles(inputs, longest)
        rows = min(rows, max(profile.shapes["inputs_embeds"].max[0] for profile in profiles))
    if settings.parity.prompts > rows:
        raise InputError(
            f"parity runs {settings.parity.prompts} prompts at once, the engine admits {rows}; raise --max-batch (or "
            "the largest shapes) or lower --prompts"
        )


def _decoder_inputs(config: dict[str, Any]) -> tuple[Binding, ...] | None:
    """The interface that the exported decoder will have; None where the configuration does not say."""
    text = config.get("text_config")
    sizes = text if isinstance(text, dict) else {}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    known = [sizes.get(name) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in known):
        return None
    width, layers, heads, kv_heads = (int(size) for size in known if size is not None)
    head = sizes.get("head_dim") or width // heads
    return (
        Binding("inputs_embeds", "float32", ("batch", "sequence", width)),
        Binding("attention_mask", "int64", ("batch", "total")),
        Binding("position_ids", "int64", ("batch", "sequence")),
        *(Binding(name, "float32", ("batch", kv_heads, "past", head)) for name in cache_input_names(layers)),
    )


def _longest(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    longest = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return longest if isinstance(longest, int) and longest > 0 else None


def _check_plan_fits_config(
    plan: SteeringPlan, config: dict[str, Any], identity: str, *, force: bool
) -> None:
    """Refuse a plan that cannot fit before a model is loaded, where the configuration says enough."""
    text = config.get("text_config")
    sizes = text if isinstance(text, dict) else {}
    check_plan_fits(
        plan,
        hidden_size=sizes.get("hidden_size", plan.hidden_size),
        num_layers=sizes.get("num_hidden_layers", plan.num_layers),
        fingerprint=identity,
        force=force,
    )


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
