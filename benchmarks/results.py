"""What steering does to the pocket LALM's answers, undefended, steered and at random, on eager and on the engine.

    python benchmarks/results.py

Calibrates the refusal vector alone and with ablation, builds a bundle, evaluates both on the held-out test clips, and
writes docs/results.md, docs/results.svg and the table in README.md. Minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from results_page import README_END, README_START, page, summary
from sarsteer_export import (
    BuildSettings,
    CalibrationSettings,
    EvaluationSettings,
    JudgeSettings,
    MeasureSettings,
    SteeringSettings,
    build,
    calibrate,
    evaluate,
)
from sarsteer_export.cli.command import Progress, quiet_transformers
from sarsteer_export.evaluation.plots import evaluation_svg
from sarsteer_export.evaluation.written import write_results

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from calibration.plan import SteeringPlan
    from sarsteer_export.evaluation.report import Evaluation

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "examples" / "pocket_lalm"
ALONE, ABLATED = "refusal vector alone", "with ablation"
MAX_NEW_TOKENS = 32
"""No answer of the pocket LALM is longer."""


@dataclass(frozen=True)
class Setup:
    """What `build.toml` says of the pocket LALM."""

    steering: SteeringSettings
    judge: JudgeSettings

    @classmethod
    def read(cls) -> Setup:
        """The settings `make demo` builds with."""
        values: dict[str, Any] = tomllib.loads((POCKET / "build.toml").read_text(encoding="utf-8"))
        steering = SteeringSettings(alpha=values["alpha"], ablation=values["lambda"], rank=values["rank"])
        return cls(steering, JudgeSettings(answer_pattern=values["answer-pattern"]))


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "build" / "results",
    show_default="build/results",
    help="Folder for plans, bundle and every output.",
)
def main(output: Path) -> None:
    """Measure the pocket LALM and write docs/results.md, docs/results.svg and the table in README.md."""
    from calibration.overlap import AllowedOverlap

    quiet_transformers()
    setup, progress = Setup.read(), Progress()
    plans = {
        ALONE: _plan(replace(setup.steering, rank=0), progress),
        ABLATED: _plan(setup.steering, progress),
    }
    output.mkdir(parents=True, exist_ok=True)
    plan_file = output / "plan.safetensors"
    plans[ABLATED].save(plan_file)
    built = BuildSettings(*_data("train"), plan=plan_file, overwrite=True)
    bundle = build(POCKET / "model", output / "bundle", built, progress=progress).path
    found = evaluate(
        bundle,
        EvaluationSettings(
            *_data("test"),
            plans=plans,
            model=POCKET / "model",
            judge=setup.judge,
            measure=MeasureSettings(MAX_NEW_TOKENS, batch_size=25),
            allow_overlap=AllowedOverlap.TRANSCRIPTS,
        ),
        progress=progress,
    )
    write_results(found, output / "evaluation", overwrite=True)
    write(found, setup)
    click.echo(found.table())


def write(found: Evaluation, setup: Setup) -> None:
    """Write the page, its picture and the table in the README."""
    (ROOT / "docs" / "results.md").write_text(page(found, setup.steering), encoding="utf-8")
    (ROOT / "docs" / "results.svg").write_text(evaluation_svg(found.rows), encoding="utf-8")
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(README_START)
    _, end, after = rest.partition(README_END)
    if not start or not end:
        raise click.ClickException(f"{readme}: {README_START} and {README_END} are not there")
    table = "\n".join(summary(found.rows))
    readme.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


def _plan(steering: SteeringSettings, progress: Progress) -> SteeringPlan:
    return calibrate(
        POCKET / "model", *_data("train"), CalibrationSettings(steering=steering), progress=progress
    )


def _data(split: str) -> tuple[Path, Path]:
    return (POCKET / "data" / f"{split}_harmful.jsonl", POCKET / "data" / f"{split}_benign.jsonl")


if __name__ == "__main__":
    main()
