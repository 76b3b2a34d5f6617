"""Prove on a machine with an NVIDIA GPU what the machines of this project cannot: one command, one report.

Asks `doctor` which engines run here; builds the pocket LALM's bundle with each of them in every precision, parity
against the steered eager model included; refits; measures steered against unsteered latency, and tokens per second
against the eager model; runs the tests marked `gpu`. Whatever could end the process runs in one of its own.

`--engine onnxruntime-cpu` is a dry run: it shows that this script works, and says so in what it writes.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.errors import ParityError, SarsteerError, UnsupportedError
from engine_build import COMMAND_LINE, random_decoder
from engines.backends import BACKENDS, CPU_BACKEND, find_backend
from engines.opening import check_can_run
from gpu_report import section, verdict
from overhead import cpu_name
from random_decoder import Settings
from sarsteer_export.bundle.manifest import PARITY_REPORT, Manifest
from sarsteer_export.diagnosis import Answer
from sarsteer_export.doctor import examine
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sarsteer_export.diagnosis import Diagnosis

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "examples" / "pocket_lalm"
MEASURE = Path(__file__).with_name("gpu_measure.py")
PRECISIONS = ("float32", "float16", "bfloat16")
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "numpy")
GPU_BACKENDS = tuple(name for name, row in BACKENDS.items() if not row.runs_without_gpu)


@dataclass(frozen=True)
class CheckSettings:
    """What to check and how much of it: rounds of latency, new tokens a row, prompts at once, blocks and width of
    the random decoder."""

    precisions: tuple[str, ...]
    rounds: int
    tokens: int
    prompts: int
    blocks: int
    width: int
    compute_capabilities: tuple[str, ...] = ()


def chosen_engines(asked: Sequence[str], diagnosis: Diagnosis) -> tuple[str, ...]:
    """The engines to check: those asked for, else all that the diagnosis does not rule out on a GPU.

    Raises `UnsupportedError` with what is missing when one that was asked for cannot run here, or none can.
    """
    if asked:
        for name in asked:
            check_can_run(find_backend(name))
        return tuple(dict.fromkeys(asked))
    rows = [row for row in diagnosis.engines if row.name in GPU_BACKENDS]
    found = tuple(row.name for row in rows if row.runs.answer is not Answer.NO)
    if found:
        return found
    missing = [
        f"{row.name}: {obstacle.reason}; {obstacle.remedy}" for row in rows for obstacle in row.runs.obstacles
    ]
    raise UnsupportedError(
        "no engine can be run on a GPU here, so that nothing could be proven:\n  " + "\n  ".join(missing)
    )


def build_command(engine: str, precision: str, bundle: Path, settings: CheckSettings) -> list[str]:
    """The words of the `build` that makes and proves the pocket LALM's bundle."""
    words = ["build", POCKET / "model", "--config", POCKET / "build.toml", "--output", bundle, "--json"]
    for kind in ("harmful", "benign"):
        words += [f"--{kind}", POCKET / "data" / f"train_{kind}.jsonl"]
    words += ["--dtype", precision, "--prompts", settings.prompts]
    if engine != CPU_BACKEND.name:
        words += ["--engine", engine]
        if BACKENDS[engine].targets:
            for capability in settings.compute_capabilities:
                words += ["--compute-capability", capability]
    return [str(word) for word in words]


def check_engine(engine: str, precision: str, settings: CheckSettings) -> dict[str, Any]:
    """Build the bundle for one engine in one precision, and measure what was built."""
    check: dict[str, Any] = {"engine": engine, "precision": precision}
    with tempfile.TemporaryDirectory(prefix="sarsteer-gpu-check-") as scratch:
        bundle = Path(scratch) / "bundle"
        words = build_command(engine, precision, bundle, settings)
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND_LINE, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode:
            return check | not_built(ended.returncode, ended.stderr)
        check |= judged(engine, bundle)
        if check["verdict"] != "passed":
            return check
        options = {
            "model": POCKET / "model",
            "requests": POCKET / "data" / "test_harmful.jsonl",
            "engine": engine,
            "rounds": settings.rounds,
            "tokens": settings.tokens,
            "prompts": settings.prompts,
        }
        measured = measure("bundle", [bundle], options)
        return check | {"measured": measured if "error" not in measured else {"measuring": measured}}


def not_built(exit_code: int, stderr: str) -> dict[str, str]:
    """The verdict on a build that ended with an error: the program's own message without its progress."""
    message = stderr.rpartition("Error: ")[2].strip()
    what = "unsupported" if exit_code == UnsupportedError.exit_code else "failed"
    return {"verdict": what, "reason": " ".join(message.split()) or f"exit code {exit_code}"}


def judged(engine: str, bundle: Path) -> dict[str, Any]:
    """Verdict and table of the parity report that lies in a bundle for an engine."""
    report = PARITY_REPORT if engine == CPU_BACKEND.name else Manifest.read(bundle).engine(engine).report
    content = json.loads((bundle / report).read_text(encoding="utf-8"))
    found = {"verdict": content["verdict"], "table": content["table"]}
    return found | ({"reason": "; ".join(content["notes"])} if content["verdict"] != "passed" else {})


def measure(what: str, arguments: Sequence[Path], options: dict[str, Any]) -> dict[str, Any]:
    """Run `gpu_measure.py` in a process of its own; what goes wrong there is `{"error": …}`."""
    words = [f"--{name}={value}" for name, value in options.items()]
    ended = subprocess.run(
        [sys.executable, str(MEASURE), what, *map(str, arguments), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        return {"error": f"exit code {ended.returncode}: {lines[-1] if lines else 'no message'}"}
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def run_tests() -> dict[str, Any]:
    """Run the tests marked `gpu`. Passed means that some ran and none failed."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return tests_result(ended.returncode, ended.stdout)


def tests_result(exit_code: int, output: str) -> dict[str, Any]:
    """What pytest's last line says."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    summary = lines[-1] if lines else f"exit code {exit_code}"
    return {
        "summary": summary,
        "passed": exit_code == 0 and re.search(r"\b[1-9]\d* passed", summary) is not None,
    }


def check_all(engines: Sequence[str], diagnosis: Diagnosis, settings: CheckSettings) -> dict[str, Any]:
    """Everything, as JSON. Takes its time; says on stderr what it is doing."""
    dry_run = all(BACKENDS[engine].runs_without_gpu for engine in engines)
    checks = []
    for engine in engines:
        for precision in settings.precisions:
            click.echo(f"{engine}, {precision}: building, proving, measuring", err=True)
            checks.append(check_engine(engine, precision, settings))
    click.echo("latency of a random decoder", err=True)
    name, random_latency = check_random_decoder(engines, settings)
    click.echo("tests marked gpu", err=True)
    tests = {"summary": "not run, there is no GPU", "passed": True} if dry_run else run_tests()
    return {
        "dry_run": dry_run,
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "gpus": [asdict(gpu) for gpu in diagnosis.driver.gpus],
        "driver": diagnosis.driver.release,
        "versions": installed_versions(*PACKAGES),
        "settings": asdict(settings),
        "checks": checks,
        "random_name": name,
        "random_decoder": random_latency,
        "tests": tests,
        "doctor": diagnosis.to_json(),
    }


def check_random_decoder(
    engines: Sequence[str], settings: CheckSettings
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Latency of a decoder large enough to keep a GPU busy, by engine, and what the decoder is called."""
    sizes = Settings(
        settings.blocks, settings.width, 32_000, positions=256, pairs=1, decode_pairs=1, threads=1, seed=0
    )
    with tempfile.TemporaryDirectory(prefix="sarsteer-gpu-check-") as scratch:
        decoder = random_decoder(sizes, "float32", Path(scratch) / "random")
        found = {}
        for engine in engines:
            options: dict[str, Any] = {
                "width": settings.width,
                "engine": engine,
                "rounds": settings.rounds,
            }
            arguments = [decoder.unsteered, decoder.steered]
            targets = settings.compute_capabilities if BACKENDS[engine].targets else ()
            extra = [Path(f"--compute-capability={capability}") for capability in targets]
            found[engine] = measure("graphs", [*arguments, *extra], options)
    return f"random, float32, {decoder.parameters / 1e6:.0f} M parameters", found


@click.command()
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(BACKENDS)),
    multiple=True,
    help="Check this engine; all that run on this machine's GPU when left out. onnxruntime-cpu is a dry run.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=PRECISIONS,
    show_default=True,
    help="May be given several times.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="8.9",
    help="Build TensorRT-RTX engines for this one; its usual ones when left out.",
)
@click.option("--rounds", type=click.IntRange(2), default=50, show_default=True, help="Rounds of latency.")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="New tokens a row.")
@click.option("--prompts", type=click.IntRange(1, 4), default=4, show_default=True, help="Requests at once.")
@click.option(
    "--blocks", type=click.IntRange(1), default=14, show_default=True, help="Of the random decoder."
)
@click.option("--width", type=click.IntRange(8), default=1024, show_default=True, help="Of its stream.")
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/gpu_check"),
    show_default=True,
    help="Folder that gpu_check.md and gpu_check.json appear in.",
)
def main(engines: tuple[str, ...], output: Path, **given: Any) -> None:
    """Prove steered engines on this machine's GPU, and write a section for docs/gpu.md.

    Exit codes: 0 all passed; 3 nothing can be run here, and what is missing; 6 something failed.

    Example: python benchmarks/gpu_check.py --engine tensorrt-rtx --precision float16
    """
    try:
        diagnosis = examine()
        click.echo(diagnosis.table(), err=True)
        chosen = chosen_engines(engines, diagnosis)
        result = check_all(chosen, diagnosis, CheckSettings(**given))
        result["command"] = command_text()
        output.mkdir(parents=True, exist_ok=True)
        text = section(result)
        (output / "gpu_check.md").write_text(text, encoding="utf-8")
        content = json.dumps(result | {"verdict": verdict(result)}, indent=2, allow_nan=False)
        (output / "gpu_check.json").write_text(content + "\n", encoding="utf-8")
        click.echo(text)
        click.echo(f"written: {output / 'gpu_check.md'}, {output / 'gpu_check.json'}", err=True)
        if verdict(result) != "passed":
            raise ParityError("something failed; the report says what")
    except SarsteerError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


def command_text() -> str:
    """The command as it was typed, but for where Python is."""
    return shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])


if __name__ == "__main__":
    main()
