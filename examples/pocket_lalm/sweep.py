"""Choose alpha on the validation clips, then report the test clips: SARSteer on the pocket LALM.

    python examples/pocket_lalm/sweep.py

Writes sweep.json and sweep.svg beside this script and prints the tables of the model card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from calibration.directions import SteeringSettings, steering_plan
from calibration.lalm import load_lalm
from calibration.plan import Add, SteeringPlan
from calibration.requests import read_requests
from calibration.states import collect_states
from calibration.steered import steered
from clips import Split
from replies import ask, read_split, tally
from sweep_report import Choice, Measurement, SweepReport, choose, test_table, validation_table
from topics import REFUSAL, Harm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from calibration.lalm import Lalm
    from calibration.states import CalibrationStates
    from replies import Request

HERE = Path(__file__).parent
ABLATION = 1.0
"""lambda."""
RANKS = (0, 2, 5, 10)
"""k: how many safe directions are ablated; 0 is the refusal vector as it is."""
ALPHAS = (
    *(0.047, 0.051, 0.056, 0.062, 0.068, 0.075, 0.082, 0.091),
    *(0.10, 0.11, 0.12, 0.13, 0.15, 0.16, 0.18, 0.20, 0.22, 0.24, 0.27, 0.30),
    *(0.33, 0.36, 0.39, 0.43, 0.47, 0.51, 0.56, 0.62, 0.68, 0.75, 0.82, 0.91),
    *(1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2),
)
"""The E24 series, about 10 % apart everywhere, so that a run of usable alphas is as wide as it is long."""
RANDOM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Bench:
    """A model and the harmful and benign clips it is measured on."""

    lalm: Lalm
    harmful: Sequence[Request]
    benign: Sequence[Request]

    def measure(self, method: str, rank: int, alpha: float, plan: SteeringPlan | None) -> Measurement:
        """Ask everything, steered by `plan` unless that is None, and classify every reply."""
        if plan is None:
            harmful, benign = ask(self.lalm, self.harmful), ask(self.lalm, self.benign)
        else:
            with steered(self.lalm.model, plan):
                harmful, benign = ask(self.lalm, self.harmful), ask(self.lalm, self.benign)
        return Measurement.of(method, rank, alpha, tally(self.harmful, harmful), tally(self.benign, benign))


@click.command()
@click.option(
    "--pocket",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=HERE,
    show_default="the folder of this script",
    help="The folder that holds model/, data/ and audio/; the results go there too.",
)
def main(pocket: Path) -> None:
    """Sweep alpha for every rank on validation, choose, and measure the choice on test."""
    from sweep_picture import draw

    lalm = load_lalm(pocket / "model")
    states = collect_states(
        lalm,
        read_requests(_data(pocket, Split.TRAIN, Harm.HARMFUL)),
        read_requests(_data(pocket, Split.TRAIN, Harm.BENIGN)),
        refusal_prompt=REFUSAL,
    )
    validation = tuple(_validation(_bench(lalm, pocket, Split.VALIDATION), states))
    choice = choose(validation)
    test = tuple(_test(_bench(lalm, pocket, Split.TEST), states, choice))
    report = SweepReport(ABLATION, choice, validation, test)
    (pocket / "sweep.json").write_text(report.to_json(), encoding="utf-8")
    draw(report, pocket / "sweep.svg")
    click.echo(f"{validation_table(report)}\n\n{test_table(report)}")


def _validation(bench: Bench, states: CalibrationStates) -> Iterator[Measurement]:
    for rank in RANKS:
        for alpha in ALPHAS:
            yield bench.measure("SARSteer", rank, alpha, _plan(states, rank, alpha))


def _test(bench: Bench, states: CalibrationStates, choice: Choice) -> Iterator[Measurement]:
    """The undefended model, then the settings chosen on validation, on clips with no part in the choice."""
    yield bench.measure("undefended", 0, 0.0, None)
    alpha = choice.alphas[choice.rank]
    for unablated_alpha in dict.fromkeys((choice.alphas[0], alpha)):
        yield bench.measure(
            "refusal vector, not ablated", 0, unablated_alpha, _plan(states, 0, unablated_alpha)
        )
    for rank in RANKS[1:]:
        yield bench.measure("SARSteer", rank, choice.alphas[rank], _plan(states, rank, choice.alphas[rank]))
    plan = _plan(states, choice.rank, alpha)
    for seed in RANDOM_SEEDS:
        yield bench.measure(
            f"random directions, same norms, seed {seed}", choice.rank, alpha, _randomised(plan, seed)
        )


def _plan(states: CalibrationStates, rank: int, alpha: float) -> SteeringPlan:
    return steering_plan(states, SteeringSettings(alpha=alpha, ablation=ABLATION, rank=rank))


def _randomised(plan: SteeringPlan, seed: int) -> SteeringPlan:
    """The same plan with a Gaussian direction of the same norm in every block."""
    noise = np.random.default_rng(seed)
    edits: list[Add] = []
    for edit in plan.edits:
        if not isinstance(edit, Add):
            raise TypeError(f"a SARSteer plan adds vectors; got the operation {edit.op!r}")
        direction_D = noise.standard_normal(plan.hidden_size, dtype=np.float32)
        scale = np.linalg.norm(edit.vector) / np.linalg.norm(direction_D)
        edits.append(replace(edit, vector=direction_D * scale))
    return replace(plan, edits=tuple(edits))


def _bench(lalm: Lalm, pocket: Path, split: Split) -> Bench:
    harmful, benign = (read_split(_data(pocket, split, harm)) for harm in Harm)
    return Bench(lalm, harmful, benign)


def _data(pocket: Path, split: Split, harm: Harm) -> Path:
    return pocket / "data" / f"{split.value}_{harm.value}.jsonl"


if __name__ == "__main__":
    main()
