"""How fast calibration is, against the loop that one would write first; on the pocket LALM, in one process.

The plain loop reads a clip, encodes one request, runs the whole prompt with `output_hidden_states=True`, keeps the last
position, and goes on: harmful requests with and without the refusal text, then benign ones; the steering vectors are
NumPy's `mean` and `svd`. The package does the same with `collect` (states and vectors) and with `calibrate` (the whole
command: checks, hashes, and the magnitudes of the stream with and without the plan, which the loop does not measure).
Every round runs all three, in a new order each time, so that drift falls on all alike.

Dimensions: N requests, L decoder blocks, D width.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from calibration.calibrate import CalibrationSettings, calibrate
from calibration.collection import Collecting, Collection
from calibration.directions import SteeringSettings, steering_vectors
from calibration.kept_prompts import KeptStore
from calibration.lalm import Lalm, encode_requests, load_lalm
from calibration.requests import SpokenRequest, read_requests
from calibration.states import load_clips
from machine import cores, cpu_name
from node_time import Spread
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

POCKET = Path(__file__).parents[1] / "examples" / "pocket_lalm"
REFUSAL, RANK, ABLATION = "I cannot assist with that.", 10, 1.0
PLAIN, COLLECT, CALIBRATE = "plain loop", "collect", "calibrate"


@dataclass(frozen=True)
class Data:
    """The requests of one calibration, and the files they are from."""

    harmful: tuple[SpokenRequest, ...]
    benign: tuple[SpokenRequest, ...]
    limit: int
    batch_size: int | None

    @classmethod
    def read(cls, limit: int, batch_size: int | None) -> Data:
        """The training requests of the pocket LALM, at most `limit` of each kind."""
        harmful, benign = (read_requests(path, limit=limit) for path in cls.files())
        return cls(harmful, benign, limit, batch_size)

    @staticmethod
    def files() -> tuple[Path, Path]:
        """The harmful and the benign file."""
        return POCKET / "data" / "train_harmful.jsonl", POCKET / "data" / "train_benign.jsonl"


def plain_loop(lalm: Lalm, data: Data) -> NDArray[np.float32]:
    """The steering vectors (L, D), computed as one would write it down first."""

    def states(request: SpokenRequest, suffix: str) -> NDArray[np.float32]:
        inputs = encode_requests(lalm, [request.text + suffix], load_clips(lalm, [request]))
        unnormed: list[torch.Tensor] = []  # the last of `hidden_states` is behind the final norm
        handle = lalm.parts.final_norm.register_forward_pre_hook(lambda _, args: unnormed.append(args[0]))
        with torch.inference_mode():
            hidden = lalm.model(**inputs, output_hidden_states=True).hidden_states
        handle.remove()
        return np.stack([layer[0, -1].float().cpu().numpy() for layer in (*hidden[1:-1], unnormed[0])])

    harmful = np.stack([states(request, "") for request in data.harmful])
    refused = np.stack([states(request, REFUSAL) for request in data.harmful])
    benign = np.stack([states(request, "") for request in data.benign])
    vectors = []
    rank = min(RANK, len(benign) - 1)  # what centred states span
    for layer in range(harmful.shape[1]):
        direction = (refused[:, layer] - harmful[:, layer]).mean(axis=0)
        safe = benign[:, layer] - benign[:, layer].mean(axis=0)
        basis = np.linalg.svd(safe.T, full_matrices=False)[0][:, :rank]
        vectors.append(direction - ABLATION * basis @ (basis.T @ direction))
    return np.stack(vectors)


def collect(lalm: Lalm, data: Data) -> NDArray[np.float32]:
    """The same vectors from the package's statistics."""
    with KeptStore.opened() as store:
        how = Collecting(batch_size=data.batch_size)
        collection = Collection(lalm, (data.harmful, data.benign), REFUSAL, store, how)
        statistics, _ = collection.collect()
    return steering_vectors(statistics, rank=RANK, ablation=ABLATION)


def whole_calibration(lalm: Lalm, data: Data) -> NDArray[np.float32]:
    """The same vectors from the plan that `sarsteer-export calibrate` would write."""
    settings = CalibrationSettings(
        SteeringSettings(ablation=ABLATION, rank=RANK), limit=data.limit, batch_size=data.batch_size
    )
    plan = calibrate(lalm, *data.files(), settings)
    return np.stack([edit.tensors()["vector"] for edit in plan.edits])


WAYS: dict[str, Callable[[Lalm, Data], NDArray[np.float32]]] = {
    PLAIN: plain_loop,
    COLLECT: collect,
    CALIBRATE: whole_calibration,
}


def measure(rounds: int, threads: int, data: Data) -> dict[str, Any]:
    """Time all ways in turn and compare what they compute."""
    torch.set_num_threads(threads)
    lalm = load_lalm(POCKET / "model")
    vectors = {name: way(lalm, data) for name, way in WAYS.items()}  # warms up, too
    order = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name in order.permutation(list(WAYS)):
            begin = time.perf_counter()
            WAYS[str(name)](lalm, data)
            taken[str(name)].append(time.perf_counter() - begin)
    clips = len(data.harmful) + len(data.benign)
    plain = np.array(taken[PLAIN])
    return {
        name: {
            "clips_per_s": asdict(Spread.of(clips / np.array(taken[name]))),
            "throughput_ratio": asdict(Spread.of(plain / np.array(taken[name]))),
            **_agreement(vectors[name], vectors[PLAIN]),
            "peak_rss_bytes": peak_memory(name, threads, data),
        }
        for name in WAYS
    }


def _agreement(got_LD: NDArray[np.float32], wanted_LD: NDArray[np.float32]) -> dict[str, float]:
    norms = [np.linalg.norm(vectors.astype(np.float64), axis=1) for vectors in (got_LD, wanted_LD)]
    cosine = np.sum(got_LD.astype(np.float64) * wanted_LD, axis=1) / norms[0] / norms[1]
    return {
        "worst_1_minus_cosine": float(1 - cosine.min()),
        "worst_norm_error": float(np.abs(norms[0] / norms[1] - 1).max()),
    }


def peak_memory(name: str, threads: int, data: Data) -> int | None:
    """Peak resident bytes of a fresh process that calibrates in one way."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_peak_memory_here, name, threads, data).result()


def _peak_memory_here(name: str, threads: int, data: Data) -> int | None:
    torch.set_num_threads(threads)
    WAYS[name](load_lalm(POCKET / "model"), data)
    status = Path("/proc/self/status")  # not getrusage, whose maximum would be the parent's
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def table(result: dict[str, Any]) -> str:
    """The result in Markdown: medians and [quartiles]."""

    lines = [
        "| | clips per second | throughput / plain loop | worst 1 − cosine; norm ratio − 1 | peak memory, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in result["ways"].items():
        memory = "unknown" if found["peak_rss_bytes"] is None else f"{found['peak_rss_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {name} | {Spread(**found['clips_per_s']).text(1)} | {Spread(**found['throughput_ratio']).text(2)} | "
            f"{found['worst_1_minus_cosine']:.0e}; {found['worst_norm_error']:.0e} | {memory} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(2), default=15, show_default=True, help="Rounds.")
@click.option("--limit", type=click.IntRange(2), default=60, show_default=True, help="Requests of each kind.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=None,
    help="Requests per pass; as `calibrate` if not given.",
)
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads; all cores if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(rounds: int, limit: int, batch_size: int | None, threads: int | None, as_json: bool) -> None:
    """Compare the throughput of calibration with that of a plain loop, in about two minutes.

    Example: python benchmarks/calibration_speed.py --rounds 5
    """
    used = threads or len(cores())
    result = {
        "hardware": {"cpu": cpu_name(), "cores": len(cores()), "system": platform.system()},
        "versions": installed_versions("torch", "transformers", "numpy"),
        "settings": {"rounds": rounds, "limit": limit, "batch_size": batch_size, "threads": used},
        "ways": measure(rounds, used, Data.read(limit, batch_size)),
    }
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else table(result))


if __name__ == "__main__":
    main()
