"""Parity of exported and steered decoders against the eager model: prepare the oracle, run the engine, compare."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.errors import InputError, ParityError
from calibration.lalm import Lalm, load_lalm
from calibration.plan import Add, SteeringPlan, check_plan_fits
from calibration.requests import SpokenRequest, load_audio, read_requests
from engines.limits import Limits, limits_for
from engines.onnxruntime_runner import OnnxRuntimeDecoder
from engines.parity import Measurement, Pair, agreement, compare_case
from engines.report import ParityReport
from engines.trace import LOGITS, Script, Trace, record
from graph_passes.onnx_file import read_graph
from graph_passes.patch import patch_model
from graph_passes.probe import expose_block_outputs
from graph_passes.residual_stream import ResidualStream, find_residual_stream
from sarsteer_export.behaviour import eager_answers
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import STEERED_DECODER, UNSTEERED_DECODER
from sarsteer_export.controls import wrong_plans
from sarsteer_export.exporting.export import export
from sarsteer_export.oracle import OracleCase, Padding, oracle_case, prompt_embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto

    from calibration.states import Progress

FEATURES_LIMIT = 5e-4
"""Largest difference of log-mel features: torch's STFT is float32, the bundle's float64, and the
logarithm magnifies that near its floor (4e-5 measured on the pocket LALM's clips)."""


ROLLOUT_TOKENS = 32
"""Longest greedy answer that is compared word for word."""


@dataclass(frozen=True)
class ParitySettings:
    """How parity is run: `prompts` per batch, `decode_steps` after the prefill, `blocks` compares block outputs."""

    prompts: int = 4
    decode_steps: int = 8
    blocks: bool = True
    backend: str = "onnxruntime-cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("prompts", "decode_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Components:
    """What was found around the decoder: figures of what comes before it, and notes on whole answers."""

    measurements: tuple[Measurement, ...]
    rollouts: tuple[str, ...]


@dataclass(frozen=True)
class VerifiedExport:
    """An unsteered decoder that was found to agree with the eager model, and what that was found with."""

    unsteered: ModelProto
    data_folder: Path
    stream: ResidualStream
    cases: tuple[OracleCase, ...]
    baselines: tuple[Trace, ...]


def verify(
    bundle: str | Path,
    model: str | Path | Lalm,
    requests: str | Path,
    settings: ParitySettings | None = None,
    *,
    progress: Progress | None = None,
) -> ParityReport:
    """Run parity again from a bundle, the checkpoint it was made from and a JSON Lines file of requests.

    Returns the report whatever its verdict on the steered engine. Raises `ParityError` when the unsteered
    decoder itself disagrees with the model, `InputError` when the bundle was altered or made from another
    checkpoint.
    """
    settings = settings or ParitySettings()
    folder = Path(bundle)
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
        components = compare_around_decoder(lalm, opened, plan, chosen, settings)
        if opened.has_unsteered:
            exported = verify_export(lalm, plan, folder / UNSTEERED_DECODER, chosen, settings, progress)
            return verify_steering(
                exported, lalm, plan, folder / STEERED_DECODER, settings, components, progress
            )
        with tempfile.TemporaryDirectory() as scratch:
            decoder = export(lalm, Path(scratch) / "onnx").decoder
            exported = verify_export(lalm, plan, decoder, chosen, settings, progress)
            return verify_steering(
                exported, lalm, plan, folder / STEERED_DECODER, settings, components, progress
            )


def parity_requests(*groups: Sequence[SpokenRequest], count: int) -> tuple[SpokenRequest, ...]:
    """`count` requests taken from the groups in turn, first ones first."""
    turns = [request for turn in zip(*groups, strict=False) for request in turn]
    rest = [request for group in groups for request in group if request not in turns]
    return tuple((turns + rest)[:count])


def verify_export(
    lalm: Lalm,
    plan: SteeringPlan,
    decoder: Path,
    requests: Sequence[SpokenRequest],
    settings: ParitySettings,
    progress: Progress | None = None,
) -> VerifiedExport:
    """Check that an unsteered decoder agrees with the eager model, before anything is patched.

    Raises `ParityError` naming the figures that do not keep their limits.
    """
    check_plan_fits(
        plan,
        hidden_size=lalm.parts.hidden_size,
        num_layers=len(lalm.parts.blocks),
        fingerprint=plan.model_fingerprint,
    )
    limits = limits_for(settings.backend, settings.precision)
    unsteered = read_graph(decoder)
    stream = find_residual_stream(unsteered)
    cases, baselines = [], []
    for number, padding in enumerate(Padding):
        case = oracle_case(
            lalm,
            plan,
            requests,
            padding=padding,
            decode_steps=settings.decode_steps,
            stream=stream if settings.blocks else None,
        )
        trace = _run(unsteered, stream, decoder.parent, case.script, settings)
        figures = agreement(f"{case.script.name}, export", case.script, case.traces.baseline, trace, limits)
        if failed := [item for item in figures if not item.passed]:
            raise ParityError(
                "the unsteered export does not agree with the eager model: "
                + "; ".join(
                    f"{item.what} {item.value:.3g} (limit {item.limit:g}) {item.detail}" for item in failed
                )
            )
        cases.append(case)
        baselines.append(trace)
        if progress is not None:
            progress("parity of the export", number + 1, len(Padding))
    return VerifiedExport(unsteered, decoder.parent, stream, tuple(cases), tuple(baselines))


def verify_steering(
    exported: VerifiedExport,
    lalm: Lalm,
    plan: SteeringPlan,
    decoder: Path,
    settings: ParitySettings,
    components: Components,
    progress: Progress | None = None,
) -> ParityReport:
    """Compare a steered decoder file with the steered eager model, negative controls included."""
    limits = limits_for(settings.backend, settings.precision)
    steered = read_graph(decoder)
    expect_effect = any(edit.strength for edit in plan.edits)
    wrong = wrong_plans(plan) if expect_effect else {}
    results = []
    for number, (case, baseline) in enumerate(zip(exported.cases, exported.baselines, strict=True)):
        script = case.script
        edited = _run(steered, exported.stream, decoder.parent, script, settings)
        controls = [("unsteered", baseline)] if expect_effect else []
        for name, wrong_plan in wrong.items():
            graph = patch_model(exported.unsteered, wrong_plan, force=True).model
            controls.append((name, _run(graph, exported.stream, exported.data_folder, script, settings)))
        pair = Pair(baseline=baseline, edited=edited)
        results.append(compare_case(script, case.traces, pair, limits, controls, expect_effect=expect_effect))
        if progress is not None:
            progress("parity of the steering", number + 1, len(exported.cases))
    return ParityReport(
        backend=settings.backend,
        precision=settings.precision,
        limits=limits,
        components=components.measurements,
        notes=components.rollouts,
        cases=tuple(results),
        context=_context(lalm, plan, exported, settings),
    )


def compare_around_decoder(
    lalm: Lalm,
    bundle: Bundle,
    plan: SteeringPlan,
    requests: Sequence[SpokenRequest],
    settings: ParitySettings,
) -> Components:
    """Compare what comes before the decoder, and what the whole bundle says, with the eager model."""
    limits = limits_for(settings.backend, settings.precision)
    return Components(
        _compare_prompts(lalm, bundle, requests, limits), _compare_rollouts(lalm, bundle, plan, requests)
    )


def _compare_rollouts(
    lalm: Lalm, bundle: Bundle, plan: SteeringPlan, requests: Sequence[SpokenRequest]
) -> tuple[str, ...]:
    """Whether bundle and eager model say the same, greedily, each on its own. No gate: near-ties may differ."""
    systems = {"unsteered": None, "steered": plan} if bundle.has_unsteered else {"steered": plan}
    notes = []
    for name, active in systems.items():
        wanted = eager_answers(lalm, requests, active, max_new_tokens=ROLLOUT_TOKENS)
        seen = bundle.generate_batch(
            [request.audio for request in requests],
            [request.text for request in requests],
            max_new_tokens=ROLLOUT_TOKENS,
            steering=active is not None,
        )
        same = sum(ours == theirs for ours, theirs in zip(wanted, seen, strict=True))
        notes.append(f"greedy rollouts, {name}: {same} of {len(requests)} word for word the same")
    return tuple(notes)


def _compare_prompts(
    lalm: Lalm, bundle: Bundle, requests: Sequence[SpokenRequest], limits: Limits
) -> tuple[Measurement, ...]:
    """What comes before the decoder: features, and prompt embeddings through encoder, embedding and template."""
    clips = [
        load_audio(request.audio, sampling_rate=lalm.sampling_rate, max_seconds=lalm.max_audio_seconds)
        for request in requests
    ]
    wanted = lalm.processor.feature_extractor(
        clips,
        sampling_rate=lalm.sampling_rate,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    features, feature_mask = bundle.frontend.features(clips)
    features_error = float(np.abs(wanted["input_features"] - features).max())
    prompts = bundle.prompts(clips, [request.text for request in requests])
    eager = prompt_embeddings(lalm, requests)
    masks_equal = np.array_equal(eager.mask, prompts.mask) and np.array_equal(
        wanted["attention_mask"], feature_mask
    )
    attended = eager.mask != 0
    embeds_error = np.inf
    if masks_equal:
        difference = np.abs(eager.embeds.astype(np.float64) - prompts.embeds)[attended].max()
        embeds_error = float(difference / np.abs(eager.embeds[attended]).max())
    case = "before the decoder"
    return (
        Measurement(case, "attention masks equal", float(masks_equal), 1.0, at_least=True),
        Measurement(case, "log-mel max abs", features_error, FEATURES_LIMIT, at_least=False),
        Measurement(
            case, "prompt embeddings max abs, relative", embeds_error, limits.max_abs, at_least=False
        ),
    )


def _run(
    graph: ModelProto, stream: ResidualStream, data_folder: Path, script: Script, settings: ParitySettings
) -> Trace:
    probed = expose_block_outputs(graph, stream) if settings.blocks else graph
    with OnnxRuntimeDecoder(probed.SerializeToString(), data_folder=data_folder) as runner:
        return record(runner, script)


def _context(
    lalm: Lalm, plan: SteeringPlan, exported: VerifiedExport, settings: ParitySettings
) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings),
        "plan_sha256": plan.digest(),
        "model": type(lalm.model).__name__,
        "model_fingerprint": lalm.fingerprint,
        "edits": len(plan.edits),
        "blocks": _norms(plan, exported),
        "versions": installed_versions(
            "torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"
        ),
        "torch_threads": torch.get_num_threads(),
    }


def _norms(plan: SteeringPlan, exported: VerifiedExport) -> list[dict[str, float | int | None]]:
    """Per block: mean norm of the unsteered stream at last prompt positions, and norm of what is added there."""
    case = exported.cases[0]
    prefill = case.traces.baseline.steps[0]
    rows: list[dict[str, float | int | None]] = []
    for block in exported.stream.blocks:
        hidden = prefill[block.output][:, -1] if block.output in prefill and block.output != LOGITS else None
        added = [
            abs(edit.strength) * float(np.linalg.norm(edit.vector))
            for edit in plan.edits
            if isinstance(edit, Add) and edit.layer == block.index
        ]
        rows.append(
            {
                "layer": block.index,
                "hidden_norm": None if hidden is None else float(np.linalg.norm(hidden, axis=-1).mean()),
                "edit_norm": sum(added),
            }
        )
    return rows


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
