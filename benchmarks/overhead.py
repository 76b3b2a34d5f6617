"""What steering costs: the paired latency ratio steered / unsteered on ONNX Runtime, and its share of node time.

The decoder is made here: a Qwen2 decoder with random weights (latency does not depend on their values),
exported, and patched with a plan of SARSteer's form, one addition to the last position behind every block.
The unsteered graph is opened twice, and the second copy is measured like the steered one: how far its ratio
is from 1 says how much of a ratio is noise.

Dimensions: B batch (1), S sequence of a pass, P past, D width, V vocabulary.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import shlex
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from machine import cores, cpu_name
from node_time import PHASES, WARM_UP_RUNS, Spread, measure_node_time
from overhead_table import table
from random_decoder import (
    Feeds,
    Settings,
    decode_feeds,
    make_decoder,
    open_session,
    prefill_feeds,
    run,
    steer_decoder,
)
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnxruntime as ort

UNSTEERED, STEERED, AGAIN = "unsteered", "steered", "unsteered again"


@dataclass(frozen=True)
class Latency:
    """One phase: milliseconds of a pass, and ratios to the unsteered pass of the same round."""

    unsteered_ms: Spread
    steered_ms: Spread
    ratio: Spread
    noise_ratio: Spread


def measure(settings: Settings) -> dict[str, Any]:
    """Make the decoder in a temporary folder, measure everything, and return it as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain, steered = folder / "decoder.onnx", folder / "decoder_steered.onnx"
        parameters = make_decoder(settings, plain)
        edits = steer_decoder(settings, plain, steered)
        memory = {UNSTEERED: peak_memory(plain, settings), STEERED: peak_memory(steered, settings)}
        graphs = {UNSTEERED: plain, STEERED: steered, AGAIN: plain}
        sessions = {side: open_session(graph, settings.threads) for side, graph in graphs.items()}
        feeds = {"prefill": prefill_feeds(sessions[UNSTEERED], settings)}
        feeds["decode"] = decode_feeds(run(sessions[UNSTEERED], feeds["prefill"]), settings)
        for phase in PHASES:
            _check_steered(sessions, feeds[phase], phase)
        latency = {
            phase: measure_latency(sessions, feeds[phase], settings.pairs_of(phase)) for phase in PHASES
        }
        del sessions
        times, nodes = measure_node_time(steered, feeds, settings, folder)
    return {
        "hardware": {"cpu": cpu_name(), "cores": len(cores()), "system": platform.system()},
        "versions": installed_versions("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "numpy"),
        "settings": asdict(settings),
        "decoder": {"parameters": parameters, "edits": edits, "dtype": "float32"},
        "latency": {phase: asdict(found) for phase, found in latency.items()},
        "node_time": {phase: asdict(found) for phase, found in times.items()},
        "steering_nodes": nodes,
        "peak_rss_bytes": memory,
    }


def _check_steered(sessions: Mapping[str, ort.InferenceSession], feeds: Feeds, phase: str) -> None:
    """A graph whose edits do nothing would be measured in vain."""
    logits = {side: run(session, feeds)["logits"].numpy() for side, session in sessions.items()}
    if np.array_equal(logits[STEERED], logits[UNSTEERED]):
        raise click.ClickException(f"{phase}: the steered decoder computes what the unsteered one does")


def measure_latency(sessions: Mapping[str, ort.InferenceSession], feeds: Feeds, rounds: int) -> Latency:
    """Time every session once a round, in a new order each round, so that drift falls on all alike."""
    for session in sessions.values():
        for _ in range(WARM_UP_RUNS):
            run(session, feeds)
    order = np.random.default_rng(0)
    taken_ms: dict[str, list[float]] = {side: [] for side in sessions}
    for _ in range(rounds):
        for side in order.permutation(list(sessions)):
            begin = time.perf_counter()
            run(sessions[str(side)], feeds)
            taken_ms[str(side)].append(1e3 * (time.perf_counter() - begin))
    reference = np.array(taken_ms[UNSTEERED])
    return Latency(
        unsteered_ms=Spread.of(taken_ms[UNSTEERED]),
        steered_ms=Spread.of(taken_ms[STEERED]),
        ratio=Spread.of(np.array(taken_ms[STEERED]) / reference),
        noise_ratio=Spread.of(np.array(taken_ms[AGAIN]) / reference),
    )


def peak_memory(graph: Path, settings: Settings) -> int | None:
    """Peak resident bytes of a fresh process that opens a decoder and runs a prefill and a decode step."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_peak_memory_here, graph, settings).result()


def _peak_memory_here(graph: Path, settings: Settings) -> int | None:
    session = open_session(graph, settings.threads)
    prefilled = run(session, prefill_feeds(session, settings))
    run(session, decode_feeds(prefilled, settings))
    # Not getrusage: its maximum survives exec, and would be that of the parent.
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=14, show_default=True, help="Decoder blocks.")
@click.option("--width", type=click.IntRange(8), default=1024, show_default=True, help="Width of the stream.")
@click.option("--vocabulary", type=click.IntRange(2), default=32_000, show_default=True, help="Tokens.")
@click.option("--positions", type=click.IntRange(1), default=256, show_default=True, help="Prefill length.")
@click.option("--pairs", type=click.IntRange(2), default=60, show_default=True, help="Prefill rounds.")
@click.option("--decode-pairs", type=click.IntRange(2), default=400, show_default=True, help="Decode rounds.")
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads; all cores if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, vectors and inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(as_json: bool, threads: int | None, **sizes: int) -> None:
    """Measure what steering costs on ONNX Runtime, in about ten minutes.

    Example: python benchmarks/overhead.py --blocks 4 --pairs 10
    """
    result = measure(Settings(threads=threads or len(cores()), **sizes))
    context = click.get_current_context()
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and name != "as_json"
    }
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result["command"] = shlex.join(["python", "benchmarks/overhead.py", *options])
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        click.echo(f"{result['command']}\n{table(result)}")


if __name__ == "__main__":
    main()
