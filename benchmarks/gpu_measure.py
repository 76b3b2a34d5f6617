"""What `gpu_check.py` measures of one engine: refit, answers, latency, tokens per second.

Runners take and give arrays of the host. A step is therefore timed with the copies in and out, and is finished, the
GPU included, when it returns.

Dimensions: B batch, S sequence of a pass, P past, T = P + S, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from calibration.errors import EngineError, SarsteerError
from calibration.lalm import load_lalm
from calibration.plan import Add, SteeringPlan
from calibration.requests import read_requests
from calibration.steered import steered
from calibration.token_positions import position_ids
from engines.backends import CPU_BACKEND, Runtime
from engines.limits import limits_for
from engines.opening import open_decoder, open_graph
from engines.sidecar import EngineRecord, sidecar_of
from engines.torch_arrays import as_tensor
from engines.trace import Script, record
from graph_passes.onnx_file import read_graph
from node_time import PHASES, WARM_UP_RUNS, Spread
from overhead import Latency
from sarsteer_export.behaviour import eager_answers
from sarsteer_export.bundle.bundle import Bundle
from sarsteer_export.bundle.manifest import COMPONENTS, DECODER, EMBEDDING, PLAN, UNSTEERED_DECODER
from sarsteer_export.exporting.components import DecoderComponent
from sarsteer_export.parity_runtime import OnnxRuntimeParity, ParityRuntime, TensorRTParity
from sarsteer_export.patching import PatchSettings, patch
from sarsteer_export.refitting import refit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from calibration.lalm import Lalm
    from calibration.requests import SpokenRequest
    from engines.backends import Backend
    from engines.runner import DecoderRunner
    from sarsteer_export.bundle.bundle import Prompts

UNSTEERED, STEERED, AGAIN = "unsteered", "steered", "unsteered again"
ENGINE, EAGER = "engine", "eager"
DECODE_STEPS = 8
"""Cached steps behind each prefill, in latency and in the comparison after a refit."""


@dataclass(frozen=True)
class Refitted:
    """A refitted engine against one built from the same plan.

    `difference`: largest difference in logits and cache, relative to the largest value; `told_apart`: the same
    between engines of the old and the new plan. `seconds`: of the refit, and of the build it saves.
    """

    difference: float
    told_apart: float
    limit: float
    seconds: float
    rebuild_seconds: float

    @property
    def passed(self) -> bool:
        """Within the limit, by a comparison that would have noticed a refit that does nothing."""
        return self.difference <= self.limit < self.told_apart


@dataclass(frozen=True)
class Throughput:
    """Greedy decoding at one batch size: tokens per second, paired ratio, share of tokens that are the same."""

    batch: int
    tokens: int
    engine: Spread
    eager: Spread
    ratio: Spread
    same_tokens: float


def paired(taken_ms: Mapping[str, Sequence[float]]) -> Latency:
    """Milliseconds of the three sides, the n-th of each from round n, as spreads and ratios within a round."""
    reference = np.array(taken_ms[UNSTEERED])
    return Latency(
        unsteered_ms=Spread.of(reference),
        steered_ms=Spread.of(taken_ms[STEERED]),
        ratio=Spread.of(np.array(taken_ms[STEERED]) / reference),
        noise_ratio=Spread.of(np.array(taken_ms[AGAIN]) / reference),
    )


def measure_latency(
    runners: Mapping[str, DecoderRunner], script: Script, rounds: int, seed: int = 0
) -> dict[str, Latency]:
    """Run a script on every side once a round, in a new order each round; a decode step is the mean of its steps."""
    for runner in runners.values():
        for _ in range(WARM_UP_RUNS):
            timed_run(runner, script)
    check_steered(runners, script)
    order = np.random.default_rng(seed)
    taken: dict[str, dict[str, list[float]]] = {phase: {side: [] for side in runners} for phase in PHASES}
    for _ in range(rounds):
        for side in order.permutation(list(runners)):
            prefill, *decode = timed_run(runners[str(side)], script)
            taken["prefill"][str(side)].append(prefill)
            taken["decode"][str(side)].append(float(np.mean(decode)))
    return {phase: paired(taken[phase]) for phase in PHASES}


def timed_run(runner: DecoderRunner, script: Script) -> list[float]:
    """Milliseconds of every step of a script."""
    runner.reset()
    taken = []
    for feeds in script.steps:
        begin = time.perf_counter()
        runner.step(feeds)
        taken.append(1e3 * (time.perf_counter() - begin))
    return taken


def check_steered(runners: Mapping[str, DecoderRunner], script: Script) -> None:
    """A decoder whose steering does nothing would be measured in vain."""
    first, second = (record(runners[side], script) for side in (UNSTEERED, STEERED))
    for number, (plain, edited) in enumerate(zip(first.steps, second.steps, strict=True)):
        if np.array_equal(plain["logits"], edited["logits"]):
            raise EngineError(f"step {number}: the steered decoder computes what the unsteered one does")


def script_of(prompts: Prompts) -> Script:
    """A prefill of real prompts (B, S, D) and cached steps of one random position each."""
    random = np.random.default_rng(0)
    embeds, mask = prompts.embeds, prompts.mask
    steps, sequences = [], []
    for _ in range(1 + DECODE_STEPS):
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -embeds.shape[1] :]
        steps.append({"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions})
        sequences.append(embeds.shape[1])
        embeds = random.standard_normal((len(embeds), 1, embeds.shape[2])).astype(embeds.dtype)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return Script("prompt", tuple(steps), tuple(sequences))


def other_plan(plan: SteeringPlan) -> SteeringPlan:
    """A plan of the same edits with other values: every vector, basis and mean moved on by one element."""
    edits = tuple(
        dataclasses.replace(edit, vector=np.roll(edit.vector, 1))
        if isinstance(edit, Add)
        else dataclasses.replace(
            edit,
            basis=np.roll(edit.basis, 1, axis=0),
            mean=None if edit.mean is None else np.roll(edit.mean, 1),
        )
        for edit in plan.edits
    )
    return dataclasses.replace(plan, edits=edits)


def runtime_of(decoder: Path, backend: Backend) -> ParityRuntime:
    """What opens graphs in memory as the shipped decoder is opened: for TensorRT, as engines like it."""
    if backend.runtime is Runtime.ONNX_RUNTIME:
        return OnnxRuntimeParity(backend)
    return TensorRTParity(backend, EngineRecord.read(sidecar_of(decoder)))


def largest_difference(runner: DecoderRunner, other: DecoderRunner, script: Script) -> float:
    """Largest difference of logits and cache over a script, relative to the largest value of the same output."""
    seen, expected = record(runner, script), record(other, script)
    pairs = [*zip(seen.steps, expected.steps, strict=True), (seen.cache, expected.cache)]
    found = 0.0
    for mine, theirs in pairs:
        for name, wanted in theirs.items():
            difference = np.abs(mine[name].astype(np.float64) - wanted.astype(np.float64)).max()
            if not np.isfinite(difference):
                raise EngineError(f"{name} holds NaN or infinite values")
            found = max(found, float(difference / np.abs(wanted.astype(np.float64)).max()))
    return found


def measure_refit(bundle: Path, decoder: Path, backend: Backend, script: Script, limit: float) -> Refitted:
    """Refit the shipped decoder with another plan, and compare it with one made from that plan."""
    plan = other_plan(SteeringPlan.load(bundle / PLAN))
    runtime = runtime_of(decoder, backend)
    with tempfile.TemporaryDirectory(prefix="sarsteer-refit-") as scratch:
        folder = Path(scratch)
        begin = time.perf_counter()
        refitted = refit(decoder, plan, folder / "refitted" / decoder.name, force=True).output
        seconds = time.perf_counter() - begin
        patched = folder / "rebuilt.onnx"
        patch(bundle / UNSTEERED_DECODER, plan, patched, PatchSettings(force=True))
        begin = time.perf_counter()
        with runtime.graph(read_graph(patched), patched.parent) as built:
            rebuild_seconds = time.perf_counter() - begin
            with runtime.file(refitted) as runner:
                difference = largest_difference(runner, built, script)
            with runtime.file(decoder) as runner:
                told_apart = largest_difference(runner, built, script)
    return Refitted(difference, told_apart, limit, seconds, rebuild_seconds)


def greedy_on_engine(
    decoder: DecoderRunner, embed: Callable[[NDArray[np.int64]], NDArray[Any]], prompts: Prompts, count: int
) -> NDArray[np.int64]:
    """`count` greedy tokens a row (B, count); a row does not stop at the end of its answer."""
    decoder.reset()
    embeds, mask, rows = prompts.embeds, prompts.mask, []
    for number in range(count):
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -embeds.shape[1] :]
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        tokens = decoder.step(feeds)["logits"][:, -1].argmax(axis=-1)
        rows.append(tokens)
        if number + 1 < count:
            embeds = embed(tokens[:, None])
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return np.stack(rows, axis=1)


def greedy_on_eager(lalm: Lalm, plan: SteeringPlan, prompts: Prompts, count: int) -> NDArray[np.int64]:
    """The same on the eager model steered by hooks; everything stays on its device until the last token."""
    accessors: Any = lalm.model
    embedding, device, cache = accessors.get_input_embeddings(), lalm.model.device, DynamicCache()
    component, rows = DecoderComponent(lalm.model), []
    with torch.inference_mode(), steered(lalm.parts, plan):
        embeds = as_tensor(prompts.embeds).to(device)
        mask = as_tensor(prompts.mask).to(device)
        for number in range(count):
            positions = position_ids(mask)[:, -embeds.shape[1] :]
            logits, cache = component(embeds, mask, positions, cache)
            tokens = logits[:, -1].argmax(dim=-1)
            rows.append(tokens)
            if number + 1 < count:
                embeds = embedding(tokens[:, None])
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return np.asarray(torch.stack(rows, dim=1).cpu().numpy())  # the copy waits for the GPU


def measure_throughput(sides: Mapping[str, Callable[[], NDArray[np.int64]]], rounds: int) -> Throughput:
    """Tokens per second of engine and eager model, run in turn; the order changes every round."""
    answers = {side: generate() for side, generate in sides.items()}  # the first run warms up
    batch, tokens = answers[ENGINE].shape
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            begin = time.perf_counter()
            sides[side]()
            rates[side].append(batch * tokens / (time.perf_counter() - begin))
    return Throughput(
        batch=batch,
        tokens=tokens,
        engine=Spread.of(rates[ENGINE]),
        eager=Spread.of(rates[EAGER]),
        ratio=Spread.of(np.array(rates[ENGINE]) / np.array(rates[EAGER])),
        same_tokens=float((answers[ENGINE] == answers[EAGER]).mean()),
    )


def of_bundle(
    bundle: Path, model: Path, requests: Path, backend: Backend, *, rounds: int, tokens: int, prompts: int
) -> dict[str, Any]:
    """Everything measured of a bundle's engine. A part that fails is told as `{"error": …}`; the others go on."""
    with Bundle(bundle, engine=backend.name) as opened:
        manifest, plan = opened.manifest, opened.plan
        asked = read_requests(requests)[:prompts]
        batches = [
            opened.prompts([request.audio for request in rows], [request.text for request in rows])
            for rows in (asked[:1], asked)
        ]
    files = COMPONENTS if backend is CPU_BACKEND else manifest.engine(backend.name).components
    decoder, precision = bundle / files[DECODER], manifest.model["dtype"]
    script = script_of(batches[0])

    def refitting() -> dict[str, Any]:
        found = measure_refit(bundle, decoder, backend, script, limits_for(backend.name, precision).max_abs)
        return asdict(found) | {"passed": found.passed}

    def latency() -> dict[str, Any]:
        runtime, plain = runtime_of(decoder, backend), bundle / UNSTEERED_DECODER
        with ExitStack() as stack:
            runners = {
                UNSTEERED: stack.enter_context(runtime.graph(read_graph(plain), plain.parent)),
                STEERED: stack.enter_context(runtime.file(decoder)),
                AGAIN: stack.enter_context(runtime.graph(read_graph(plain), plain.parent)),
            }
            found = measure_latency(runners, script, rounds)
        return {"positions": script.sequences[0]} | {phase: asdict(one) for phase, one in found.items()}

    def throughput() -> list[dict[str, Any]]:
        lalm = load_lalm(model, device="cpu" if backend is CPU_BACKEND else "cuda", dtype=precision)
        with (
            open_graph(bundle / files[EMBEDDING], backend) as table,
            open_decoder(decoder, backend) as runner,
        ):

            def embed(ids: NDArray[np.int64]) -> NDArray[Any]:
                return table.run({"input_ids": ids})["inputs_embeds"]

            return [
                asdict(
                    measure_throughput(
                        {
                            ENGINE: partial(greedy_on_engine, runner, embed, batch, tokens),
                            EAGER: partial(greedy_on_eager, lalm, plan, batch, tokens),
                        },
                        max(2, rounds // 4),
                    )
                )
                for batch in batches
            ]

    def answers() -> dict[str, Any]:
        lalm = load_lalm(model, device="cpu" if backend is CPU_BACKEND else "cuda", dtype=precision)
        with Bundle(bundle, engine=backend.name) as opened:
            return measure_answers(opened, lalm, plan, asked, tokens)

    parts = {"refit": refitting, "answers": answers, "latency": latency, "throughput": throughput}
    return {name: told(part) for name, part in parts.items()}


def measure_answers(
    bundle: Bundle, lalm: Lalm, plan: SteeringPlan, asked: Sequence[SpokenRequest], tokens: int
) -> dict[str, Any]:
    """What a bundle's users call, one request after the other, against the eager model: how many say the same.

    Greedy answers may part at a near-tie, so that this is told and is not a verdict; that a stream says what
    `generate` says is one.
    """
    wanted = [eager_answers(lalm, [request], plan, max_new_tokens=tokens)[0] for request in asked]
    seen = [bundle.generate(request.audio, request.text, max_new_tokens=tokens) for request in asked]
    first = asked[0]
    streamed = "".join(bundle.stream(first.audio, first.text, max_new_tokens=tokens))
    if streamed != seen[0]:
        raise EngineError(f"the stream says {streamed!r}, generate {seen[0]!r}")
    same = sum(ours == theirs for ours, theirs in zip(seen, wanted, strict=True))
    return {"same": same, "of": len(asked), "engine": seen[0], "eager": wanted[0]}


def told(work: Callable[[], Any]) -> Any:
    """The result, or what went wrong."""
    try:
        return work()
    except (SarsteerError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
