"""Prove on a GPU what cannot be proven without one: parity, refit, latency and throughput of every engine that runs.

The pocket LALM is built with each of them, so that parity with the steered eager model runs by itself; then each
engine is refitted and measured, and the tests marked `gpu` are run. The result is Markdown for `docs/gpu.md`.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.errors import ParityError, SarsteerError, UnsupportedError
from engines.backends import BACKENDS, CPU_BACKEND, find_backend
from engines.limits import LIMITS
from engines.opening import check_can_run
from gpu_measure import of_bundle
from machine import cpu_name
from node_time import Spread
from sarsteer_export import BuildSettings, CalibrationSettings, EngineSettings, SteeringSettings, build
from sarsteer_export.bundle.manifest import PARITY_REPORT, Manifest
from sarsteer_export.cli.command import quiet_transformers
from sarsteer_export.doctor import examine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.backends import Backend

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "examples" / "pocket_lalm"
PRECISIONS = ("float32", "float16", "bfloat16")
PASSED, FAILED, UNSUPPORTED = "passed", "failed", "cannot be run here"
"""Verdicts; that of parity is among them."""


def runnable(names: Sequence[str]) -> list[Backend]:
    """The backends asked for, or all that this machine can run besides the CPU.

    Raises `UnsupportedError` when there is none, or when one that was asked for cannot run.
    """
    if names:
        for name in names:
            check_can_run(find_backend(name))
        return [find_backend(name) for name in names]
    found, reasons = [], []
    for backend in BACKENDS.values():
        if backend is not CPU_BACKEND:
            try:
                check_can_run(backend)
                found.append(backend)
            except UnsupportedError as error:
                reasons.append(str(error))
    if not found:
        raise UnsupportedError("no engine runs on this machine:\n  " + "\n  ".join(reasons))
    return found


def check(
    backend: Backend,
    precision: str,
    folder: Path,
    *,
    compute_capabilities: tuple[str, ...] = (),
    rounds: int,
    tokens: int,
) -> dict[str, Any]:
    """Build the pocket LALM for one engine, prove it, and measure it. What fails is told, not raised.

    `compute_capabilities`: what to build for, where the backend builds for several GPUs.
    """
    bundle, data = folder / f"{backend.name}-{precision}", POCKET / "data"
    result: dict[str, Any] = {"engine": backend.name, "precision": precision}
    settings = BuildSettings(
        harmful=data / "train_harmful.jsonl",
        benign=data / "train_benign.jsonl",
        calibration=CalibrationSettings(steering=SteeringSettings(alpha=0.39, rank=5)),
        dtype=precision,
        engine=EngineSettings(
            engines=() if backend is CPU_BACKEND else (backend.name,),
            max_batch=8,
            compute_capabilities=compute_capabilities if backend.targets else (),
        ),
    )
    try:
        build(POCKET / "model", bundle, settings)
        entries = Manifest.read(bundle).engines
        file = bundle / (entries[0].report if entries else PARITY_REPORT)
        report = json.loads(file.read_text(encoding="utf-8"))
        result |= {"verdict": report["verdict"], "version": backend.version(), "table": report["table"]}
        measured = of_bundle(
            bundle,
            POCKET / "model",
            data / "test_harmful.jsonl",
            backend,
            rounds=rounds,
            tokens=tokens,
            prompts=4,
        )
    except UnsupportedError as error:  # libraries of a provider, say: they only show when a graph is opened
        return result | {"verdict": UNSUPPORTED, "error": str(error)}
    except Exception as error:  # whatever it is, the other engines are checked all the same
        return result | {"verdict": FAILED, "error": f"{type(error).__name__}: {error}"}
    return result | measured


def failures(found: dict[str, Any]) -> list[str]:
    """What is wrong with what was run, a line each."""
    lines = []
    for result in found["results"]:
        where = f"{result['engine']}, {result['precision']}"
        if result["verdict"] not in (PASSED, UNSUPPORTED):
            lines.append(f"{where}: {result['verdict']}")
        for part in ("refit", "answers", "latency", "throughput"):
            measured = result.get(part, {})
            if "error" in measured or (part == "refit" and not measured.get("passed", True)):
                lines.append(f"{where}: {part}")
    ran = re.search(r"\b[1-9]\d* passed", found["tests"]["summary"])
    if found["tests"]["exit_code"] or not (ran or is_dry(found)):
        lines.append("pytest -m gpu")
    return lines


def is_dry(found: dict[str, Any]) -> bool:
    """Whether nothing but the CPU was checked."""
    return {result["engine"] for result in found["results"]} <= {CPU_BACKEND.name}


def exit_code(found: dict[str, Any]) -> int:
    """6 when something failed, 3 when no engine could be run after all, otherwise 0."""
    if failures(found):
        return ParityError.exit_code
    passed = any(result["verdict"] == PASSED for result in found["results"])
    return 0 if passed else UnsupportedError.exit_code


def gpu_tests() -> dict[str, Any]:
    """Exit code and last line of the tests marked `gpu`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else done.stderr.strip()}


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["**A dry run on the CPU: it says nothing about a GPU.**", ""] if is_dry(found) else []
    lines += [f"**Failed:** {'; '.join(failed)}", ""] if (failed := failures(found)) else []
    lines += [
        f"Command: `{found['command']}`",
        "",
        "```",
        found["doctor"],
        "```",
        "",
        f"`pytest -m gpu`: {found['tests']['summary']}",
    ]
    for result in found["results"]:
        title = f"{result['engine']} {result.get('version', '')}".strip()
        lines += ["", f"### {title}, {result['precision']}: {result['verdict']}", ""]
        if "error" in result:
            lines.append(result["error"])
            continue
        lines += _refit_lines(result["refit"])
        lines += _answer_lines(result["answers"])
        lines += _latency_lines(result["latency"])
        lines += _throughput_lines(result["throughput"])
        lines += ["", "```", result["table"], "```"]
    return "\n".join(lines) + "\n"


def _refit_lines(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"Refit: {found['error']}"]
    verdict = PASSED if found["passed"] else FAILED
    return [
        f"Refit: {verdict}; refitted against rebuilt {found['difference']:.2g} (limit {found['limit']:.2g}), old "
        f"against new {found['told_apart']:.2g}; {found['seconds']:.2f} s instead of {found['rebuild_seconds']:.2f} s"
    ]


def _answer_lines(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["", f"Answers: {found['error']}"]
    lines = ["", f"Answers: {found['same']} of {found['of']} word for word those of the steered eager model"]
    if found["same"] < found["of"]:
        lines.append(f"(the first: {found['engine']!r}; eager: {found['eager']!r})")
    return lines


def _latency_lines(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["", f"Latency: {found['error']}"]
    lines = [
        "",
        "| phase | unsteered, ms | steered / unsteered | unsteered again / unsteered |",
        "| --- | --- | --- | --- |",
    ]
    for phase in ("prefill", "decode"):
        one = {name: Spread(**values) for name, values in found[phase].items()}
        cells = (one["unsteered_ms"].text(3), one["ratio"].text(4), one["noise_ratio"].text(4))
        lines.append(f"| {phase}, {found['positions']} positions | {' | '.join(cells)} |")
    return lines


def _throughput_lines(found: Any) -> list[str]:
    if isinstance(found, dict):
        return ["", f"Throughput: {found['error']}"]
    lines = [
        "",
        "| batch | engine, tokens/s | hooked eager PyTorch, tokens/s | ratio | same tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in found:
        cells = [Spread(**entry[side]).text(1) for side in ("engine", "eager", "ratio")]
        lines.append(f"| {entry['batch']} | {' | '.join(cells)} | {entry['same_tokens']:.0%} |")
    return lines


@click.command()
@click.option(
    "--engine", "names", multiple=True, help="Engine to check; by default every one that runs here."
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Precision to check; by default all.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    help="What to build TensorRT-RTX engines for, where doctor says that the default does not serve this GPU.",
)
@click.option(
    "--rounds", type=click.IntRange(2), default=30, show_default=True, help="Paired latency rounds."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each answer."
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("gpu_check.md"),
    show_default=True,
    help="Markdown to write; JSON lies beside it.",
)
def main(names: tuple[str, ...], precisions: tuple[str, ...], output: Path, **settings: Any) -> None:
    """Check every engine that runs on this machine.

    Exit code 0: all that was run passed; 3: nothing could be run; 6: something failed, the Markdown says what.
    `--engine onnxruntime-cpu` is a dry run of this script: it says nothing about a GPU.
    """
    try:
        backends = runnable(names)
    except SarsteerError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    output.parent.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    results = []
    with tempfile.TemporaryDirectory(prefix="sarsteer-gpu-check-") as scratch:
        for backend in backends:
            for precision in precisions or PRECISIONS:
                if (backend.name, precision) in LIMITS:
                    click.echo(f"{backend.name}, {precision}", err=True)
                    results.append(check(backend, precision, Path(scratch), **settings))
    found = {
        "command": f"python benchmarks/gpu_check.py {' '.join(sys.argv[1:])}".strip(),
        "cpu": cpu_name(),
        "system": platform.platform(),
        "doctor": examine().table(),
        "tests": gpu_tests(),
        "results": results,
    }
    output.write_text(page(found), encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    click.echo(page(found))
    sys.exit(exit_code(found))


if __name__ == "__main__":
    main()
