"""What patching a large decoder costs: seconds and memory, by the command line and by the Python API.

The decoders are made here (`scaled_decoder.py`): 32 blocks of width 4096 with 14 GB of weights, and 80 blocks of
width 8192 with 140 GB, in sparse files that take no room. The plan is of SARSteer's form: one addition to the last
position behind every block. Every figure is that of a process of its own.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from machine import available_bytes, cores, cpu_name
from node_time import Spread
from patch_scale_table import table
from sarsteer_export import Add, SteeringPlan
from sarsteer_export.versions import installed_versions
from scaled_decoder import SHAPES, ScaledDecoder

REPORT = """
def report(**values):
    # Not getrusage: its maximum survives exec, and would be that of the parent.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    counted = dict(line.split(":", 1) for line in open("/proc/self/io"))
    values["peak_rss_bytes"] = 1024 * int(status["VmHWM"].split()[0])
    values["read_bytes"] = int(counted["rchar"])
    with open(sys.argv.pop(1), "w") as file:
        json.dump(values, file)
"""
"""Peak memory of a process by its own account, and the bytes it asked to read."""
IMPORTS = f"import json, sys{REPORT}import sarsteer_export.cli.patch, sarsteer_export.patching\n"
BARE = f"{IMPORTS}report()"
COMMAND_LINE = f"""import atexit, json, sys{REPORT}
atexit.register(report)
from sarsteer_export.cli import main
main(sys.argv[2:])"""
PYTHON_API = f"""{IMPORTS}import time
from sarsteer_export import patch
begin = time.perf_counter()
patch(*sys.argv[2:])
report(seconds=time.perf_counter() - begin)"""
LOAD_WHOLE = f"""import json, sys, time, onnx{REPORT}
begin = time.perf_counter()
onnx.load(sys.argv[2])
report(seconds=time.perf_counter() - begin)"""


@dataclass(frozen=True)
class Patching:
    """Spreads over runs. `read_bytes`: what a process reads beyond what a bare process does."""

    command_seconds: Spread
    command_above_imports_bytes: Spread
    command_read_bytes: Spread
    patch_seconds: Spread
    patch_above_imports_bytes: Spread
    imports_seconds: Spread
    imports_rss_bytes: Spread


@dataclass(frozen=True)
class Fingerprint:
    """What of a file shows that it was written to, or replaced."""

    inode: int
    size: int
    blocks: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """The file as it is now."""
        found = path.stat()
        return cls(found.st_ino, found.st_size, found.st_blocks, found.st_mtime_ns, found.st_ctime_ns)


def measure(name: str, runs: int, *, load_whole: bool) -> dict[str, Any]:
    """Make one decoder in a temporary folder, patch it over and over, and return the figures as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        decoder = ScaledDecoder.make(SHAPES[name], folder)
        plan, edits = save_plan(decoder, folder / "plan.safetensors")
        before = Fingerprint.of(decoder.data)
        patching = measure_patching(decoder, plan, runs)
        untouched = Fingerprint.of(decoder.data) == before
        whole = _load_whole(decoder) if load_whole else None
        return {
            "shape": asdict(decoder.shape) | {"width": decoder.shape.width},
            "nodes": decoder.nodes,
            "edits": edits,
            "graph_bytes": decoder.graph.stat().st_size,
            "data_bytes": before.size,
            "data_bytes_on_disk": 512 * before.blocks,
            "data_untouched": untouched,
            "patching": asdict(patching),
            "load_whole": whole,
        }


def save_plan(decoder: ScaledDecoder, path: Path) -> tuple[Path, int]:
    """Save a plan with one addition to the last position behind every block; its path and its number of edits."""
    random = np.random.default_rng(0)
    shape = decoder.shape
    edits = tuple(
        Add(block, random.standard_normal(shape.width).astype(np.float32), strength=0.1)
        for block in range(shape.blocks)
    )
    SteeringPlan(shape.width, shape.blocks, edits).save(path)
    return path, len(edits)


def measure_patching(decoder: ScaledDecoder, plan: Path, runs: int) -> Patching:
    """Patch in fresh processes, by both ways in turn, beside a process that only imports."""
    steered = decoder.graph.with_name("steered.onnx")
    found: dict[str, list[float]] = {name: [] for name in Patching.__annotations__}
    for _ in range(runs + 1):
        bare = in_a_process(BARE)
        command = in_a_process(COMMAND_LINE, "patch", decoder.graph, "--plan", plan, "--output", steered)
        _check_steered(steered, decoder)
        steered.unlink()
        called = in_a_process(PYTHON_API, decoder.graph, plan, steered)
        steered.unlink()
        row = {
            "command_seconds": command["process_seconds"],
            "command_above_imports_bytes": command["peak_rss_bytes"] - bare["peak_rss_bytes"],
            "command_read_bytes": command["read_bytes"] - bare["read_bytes"],
            "patch_seconds": called["seconds"],
            "patch_above_imports_bytes": called["peak_rss_bytes"] - bare["peak_rss_bytes"],
            "imports_seconds": bare["process_seconds"],
            "imports_rss_bytes": bare["peak_rss_bytes"],
        }
        for key, value in row.items():
            found[key].append(value)
    # The first round reads the libraries from the disk, and is not counted.
    return Patching(**{key: Spread.of(values[1:]) for key, values in found.items()})


def _check_steered(steered: Path, decoder: ScaledDecoder) -> None:
    """A graph without its edits would be measured in vain."""
    if steered.stat().st_size < decoder.graph.stat().st_size + 2 * decoder.shape.width * decoder.shape.blocks:
        raise click.ClickException(f"{steered}: holds less than the graph and a vector for every block")


def in_a_process(code: str, *arguments: str | Path) -> dict[str, Any]:
    """Run code in a fresh interpreter; what it reports, and the seconds from its start to its end."""
    with tempfile.NamedTemporaryFile(mode="r", suffix=".json") as reported:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, reported.name, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            raise click.ClickException(done.stderr)
        values: dict[str, Any] = json.load(reported)
        return values | {"process_seconds": seconds}


def _load_whole(decoder: ScaledDecoder) -> dict[str, Any]:
    """What `onnx.load` with all weights takes, once; nothing when the memory for them is not there."""
    needed, free = decoder.data.stat().st_size * 5 // 4, available_bytes()
    if free is not None and needed > free:
        return {"skipped": f"needs about {needed / 1e9:.0f} GB of memory; {free / 1e9:.0f} GB are available"}
    return in_a_process(LOAD_WHOLE, decoder.graph)


@click.command()
@click.option(
    "--shape",
    "shapes",
    type=click.Choice(list(SHAPES)),
    multiple=True,
    default=("7b", "70b"),
    show_default=True,
    help="Decoder to make; may be given several times.",
)
@click.option("--runs", type=click.IntRange(1), default=15, show_default=True, help="Runs of each process.")
@click.option("--load-whole", is_flag=True, help="Load each decoder with its weights too, once, if they fit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(shapes: tuple[str, ...], runs: int, load_whole: bool, as_json: bool) -> None:
    """Measure what patching a large decoder costs, in about two minutes. Linux only.

    Example: python benchmarks/patch_scale.py --shape 7b --runs 5 --load-whole
    """
    if not Path("/proc/self/io").is_file():
        raise click.ClickException("memory is read from /proc, which this system does not have")
    options = [*(word for name in shapes for word in ("--shape", name)), "--runs", str(runs)]
    options += ["--load-whole"] if load_whole else []
    result = {
        "command": shlex.join(["python", "benchmarks/patch_scale.py", *options]),
        "hardware": {"cpu": cpu_name(), "cores": len(cores()), "system": platform.system()},
        "versions": {"python": platform.python_version(), **installed_versions("onnx", "protobuf", "numpy")},
        "runs": runs,
        "decoders": {name: measure(name, runs, load_whole=load_whole) for name in dict.fromkeys(shapes)},
    }
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        click.echo(f"{result['command']}\n{table(result)}")


if __name__ == "__main__":
    main()
