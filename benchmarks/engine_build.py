"""What steering costs when an engine is built: time, memory, size and layers, steered against unsteered.

Real engines are built by `sarsteer-export build-engine`, each in a process of its own, so that the peak memory is that
of this build alone; all figures are those of the engine's sidecar. The unsteered decoder is built twice a round: how
far the ratio of the two is from 1 says how much of a ratio is noise.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from machine import cpu_name
from node_time import Spread
from random_decoder import Settings, make_decoder, steer_decoder
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

POCKET = Path(__file__).parents[1] / "examples" / "pocket_lalm" / "model"
COMMAND_LINE = "from sarsteer_export.cli import main; main()"
UNSTEERED, STEERED, AGAIN = SIDES = ("unsteered", "steered", "unsteered again")
PRECISIONS = ("float32", "float16", "bfloat16")
PACKAGES = ("tensorrt-rtx", "tensorrt", "onnx", "torch", "transformers", "numpy")
ROWS = (
    ("build time, s", "seconds", 1.0, 2),
    ("peak memory, MiB", "peak_rss_bytes", 2.0**-20, 0),
    ("engine, MiB", "engine_bytes", 2.0**-20, 2),
    ("layers of the network", "layers", 1.0, 0),
)
"""The table's rows: title, figure, scale, digits."""


@dataclass(frozen=True)
class Decoder:
    """A decoder to build engines of: the same graph without and with steering, and its number of parameters."""

    name: str
    precision: str
    parameters: int
    edits: int
    unsteered: Path
    steered: Path


@dataclass(frozen=True)
class Build:
    """One build, as the sidecar tells it: seconds from parsing to the serialized engine, peak resident bytes of
    the process, bytes of the engine, layers of the parsed network."""

    seconds: float
    peak_rss_bytes: int
    engine_bytes: int
    layers: int

    @classmethod
    def of(cls, sidecar: Mapping[str, Any], edits: int) -> Build:
        """From a sidecar. An engine that is not steered as it should be would be measured in vain."""
        # An addition has one vector, and a scalar of its own for the positions that get nothing.
        found = sum(constant["name"].endswith(".vector") for constant in sidecar["steering"])
        if found != edits:
            raise click.ClickException(f"the engine holds {found} steering vectors; expected {edits}")
        facts = sidecar["build"]
        return cls(facts["seconds"], facts["peak_rss_bytes"], sidecar["engine"]["bytes"], facts["layers"])


@dataclass(frozen=True)
class Compared:
    """One figure over all rounds: its values on both sides, and ratios to the unsteered build of the same round."""

    unsteered: Spread
    steered: Spread
    ratio: Spread
    noise_ratio: Spread


def compare(rounds: Sequence[Mapping[str, Build]]) -> dict[str, Compared]:
    """Every figure of rounds in which each side was built once, steered against unsteered, paired."""
    found = {}
    for figure in (field.name for field in fields(Build)):
        values = {side: np.array([getattr(built[side], figure) for built in rounds], float) for side in SIDES}
        found[figure] = Compared(
            unsteered=Spread.of(values[UNSTEERED]),
            steered=Spread.of(values[STEERED]),
            ratio=Spread.of(values[STEERED] / values[UNSTEERED]),
            noise_ratio=Spread.of(values[AGAIN] / values[UNSTEERED]),
        )
    return found


def measure(decoder: Decoder, engine: str, rounds: int, seed: int) -> dict[str, Any]:
    """Build every side once a round, in a new order each round, so that drift falls on all alike."""
    random = np.random.default_rng(seed)
    built = []
    for number in range(1, rounds + 1):
        click.echo(f"{decoder.name}, {decoder.precision}: round {number} of {rounds}", err=True)
        order = random.permutation(SIDES)
        built.append({str(side): build_once(decoder, str(side), engine) for side in order})
    return {
        "decoder": decoder.name,
        "precision": decoder.precision,
        "parameters": decoder.parameters,
        "edits": decoder.edits,
        "figures": {name: asdict(found) for name, found in compare(built).items()},
        "rounds": [{side: asdict(one) for side, one in sides.items()} for sides in built],
    }


def build_once(decoder: Decoder, side: str, engine: str) -> Build:
    """Build one engine in a process of its own, take its figures from the sidecar and throw it away."""
    graph, edits = (decoder.steered, decoder.edits) if side == STEERED else (decoder.unsteered, 0)
    output = graph.parent / "engines"
    words = ["build-engine", str(graph), "--engine", engine, "--output", str(output), "--json"]
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, *words], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise click.ClickException(f"{graph.name} was not built: {ended.stderr.strip()}")
    (sidecar,) = json.loads(ended.stdout)["engines"]
    shutil.rmtree(output)
    return Build.of(sidecar, edits)


def random_decoder(settings: Settings, precision: str, folder: Path) -> Decoder:
    """A random Qwen2 decoder in `folder`, unsteered and with an addition behind every block."""
    plain, edited = folder / "decoder.onnx", folder / "decoder_steered.onnx"
    with default_dtype(precision):
        parameters = make_decoder(settings, plain)
    return Decoder(
        "random Qwen2", precision, parameters, steer_decoder(settings, plain, edited), plain, edited
    )


def pocket_decoder(settings: Settings, precision: str, folder: Path) -> Decoder:
    """The pocket LALM's decoder in `folder`, unsteered and with an addition behind every block."""
    from calibration.lalm import load_lalm
    from sarsteer_export.cli.command import quiet_transformers
    from sarsteer_export.exporting.export import export_decoder

    quiet_transformers()
    plain, edited = folder / "decoder.onnx", folder / "decoder_steered.onnx"
    lalm = load_lalm(POCKET, dtype=precision)
    parts = lalm.parts
    export_decoder(lalm.model, plain)
    sizes = Settings(**asdict(settings) | {"blocks": len(parts.blocks), "width": parts.hidden_size})
    edits = steer_decoder(sizes, plain, edited)
    weights = {id(weight): weight for part in (parts.decoder, parts.lm_head) for weight in part.parameters()}
    embedding: Any = lalm.model.get_input_embeddings()  # the graph takes embeddings
    weights.pop(id(embedding.weight), None)
    parameters = sum(weight.numel() for weight in weights.values())
    return Decoder("pocket LALM", precision, parameters, edits, plain, edited)


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """Within the block PyTorch makes weights of this type."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def benchmark(settings: Settings, engine: str, precisions: Sequence[str], rounds: int) -> dict[str, Any]:
    """Make the decoders, each in a temporary folder of its own, build all engines, and return the result as JSON."""
    results = []
    for precision in precisions:
        for make in (partial(random_decoder, settings), partial(pocket_decoder, settings)):
            with tempfile.TemporaryDirectory(prefix="sarsteer-bench-") as folder:
                results.append(measure(make(precision, Path(folder)), engine, rounds, settings.seed))
    return {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": installed_versions(*PACKAGES),
        "settings": {"engine": engine, "rounds": rounds, "blocks": settings.blocks, "width": settings.width}
        | {"vocabulary": settings.vocabulary, "seed": settings.seed},
        "results": results,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people, as Markdown."""
    hardware, settings = result["hardware"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['system']}; {versions}",
        f"--engine {settings['engine']}; medians and [quartiles] over {settings['rounds']} rounds",
    ]
    for entry in result["results"]:
        lines += [
            "",
            f"{entry['decoder']}, {entry['precision']}, {entry['parameters'] / 1e6:.1f} M parameters, "
            f"{entry['edits']} edits:",
            "",
            "| | unsteered | steered | **steered / unsteered** | unsteered again / unsteered |",
            "| --- | --- | --- | --- | --- |",
        ]
        for title, figure, scale, digits in ROWS:
            found = {name: Spread(**values) for name, values in entry["figures"][figure].items()}
            sides = (found["unsteered"], found["steered"])
            cells = [
                Spread(side.median * scale, side.lower * scale, side.upper * scale).text(digits)
                for side in sides
            ]
            cells += [found["ratio"].text(4), found["noise_ratio"].text(4)]
            lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--engine", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", show_default=True
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Builds of each side.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=("float32", "float16"),
    show_default=True,
    help="Of the decoders; may be given several times.",
)
@click.option(
    "--blocks", type=click.IntRange(1), default=8, show_default=True, help="Random decoder's blocks."
)
@click.option("--width", type=click.IntRange(8), default=768, show_default=True, help="Its width.")
@click.option("--vocabulary", type=click.IntRange(2), default=8_000, show_default=True, help="Its tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, vectors and orders.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here too.")
def main(
    engine: str, rounds: int, precisions: tuple[str, ...], file: Path | None, seed: int, **sizes: int
) -> None:
    """Measure what steering costs when an engine is built, in about five minutes; no GPU is needed.

    Example: python benchmarks/engine_build.py --rounds 3 --blocks 4
    """
    settings = Settings(positions=256, pairs=1, decode_pairs=1, threads=1, seed=seed, **sizes)
    result = benchmark(settings, engine, precisions, rounds)
    if file is not None:
        file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    click.echo(table(result))


if __name__ == "__main__":
    main()
