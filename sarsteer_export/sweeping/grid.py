"""The grid of a sweep: alphas in order on every line, a line being one lambda, rank and set of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from calibration.directions import SteeringSettings
from calibration.errors import InputError

SIGNIFICANT_DIGITS = 3
"""To how many digits alphas of a geometric series are rounded, so that they can be written down and given again."""
E24 = (
    *(1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2, 2.4, 2.7, 3.0),
    *(3.3, 3.6, 3.9, 4.3, 4.7, 5.1, 5.6, 6.2, 6.8, 7.5, 8.2, 9.1),
)
"""The preferred numbers of IEC 60063: 24 to a decade, about 10 % apart."""
MOST_ALPHAS = 1000
ALPHAS_FORM = "write e.g. 0.1,0.2,0.4, or 0.05:2:12 (12 values, evenly spaced as a ratio), or e24:0.05:2"

Layers = tuple[int, ...] | None


@dataclass(frozen=True)
class Line:
    """One lambda, rank k and set of blocks, along which alpha runs. `layers` of None is every block.

    Rank 0 and lambda 0 both leave the refusal direction as it is; such a line has both at 0.
    """

    ablation: float
    rank: int
    layers: Layers = None

    @property
    def ablated(self) -> bool:
        """Whether anything is taken out of the refusal direction."""
        return self.rank > 0

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        steering = f"k = {self.rank}, λ = {self.ablation:g}" if self.ablated else "not ablated"
        return steering if self.layers is None else f"{steering}, blocks {layers_text(self.layers)}"

    def settings(self, alpha: float) -> SteeringSettings:
        """The steering at one strength."""
        return SteeringSettings(alpha=alpha, ablation=self.ablation, rank=self.rank, layers=self.layers)


@dataclass(frozen=True)
class Grid:
    """Every alpha with every line: `ablations` are lambdas, `ranks` k, `layer_sets` blocks or None for all.

    Raises `InputError` for values that no plan can have, and for a grid without values.
    """

    alphas: tuple[float, ...]
    ablations: tuple[float, ...] = (1.0,)
    ranks: tuple[int, ...] = (0, 10)
    layer_sets: tuple[Layers, ...] = (None,)

    def __post_init__(self) -> None:
        for name, values in (
            ("alphas", self.alphas),
            ("lambdas", self.ablations),
            ("ranks", self.ranks),
            ("layer sets", self.layer_sets),
        ):
            if not values:
                raise InputError(f"the sweep has no {name}; expected at least one")
        if bad := [alpha for alpha in self.alphas if not (math.isfinite(alpha) and alpha > 0)]:
            raise InputError(
                f"alpha is {bad[0]:g}; expected finite numbers above 0 (0 is the undefended model, which is measured "
                "anyway)"
            )
        if bad := [
            ablation for ablation in self.ablations if not (math.isfinite(ablation) and ablation >= 0)
        ]:
            raise InputError(f"lambda is {bad[0]:g}; expected finite numbers of at least 0")
        if any(rank < 0 for rank in self.ranks):
            raise InputError(f"rank is {min(self.ranks)}; expected at least 0")
        object.__setattr__(self, "alphas", tuple(sorted(set(self.alphas))))

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines in the order of the options, those that are the same plan once."""
        made = (
            Line(ablation, rank, layers) if rank and ablation else Line(0.0, 0, layers)
            for layers, ablation, rank in product(self.layer_sets, self.ablations, self.ranks)
        )
        return tuple(dict.fromkeys(made))


def parse_alphas(text: str) -> tuple[float, ...]:
    """Strengths from parts parted by commas, each a number, `LOW:HIGH:COUNT` or `e24:LOW:HIGH`.

    Raises `InputError` for anything else.
    """
    found: list[float] = []
    for part in text.split(","):
        fields = [field.strip() for field in part.split(":")]
        try:
            if fields[0].lower() == "e24":
                low, high = map(float, fields[1:])
                found += preferred(low, high)
            elif len(fields) == 1:
                found.append(float(fields[0]))
            else:
                low, high, count = float(fields[0]), float(fields[1]), int(fields[2])
                if len(fields) != 3:
                    raise ValueError
                found += geometric(low, high, count)
        except (ValueError, IndexError, OverflowError):
            raise InputError(f"--alphas: {part.strip()!r} is no strength; {ALPHAS_FORM}") from None
    return tuple(found)


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from low to high, each the same multiple of the one before. Raises `ValueError`."""
    if not (0 < low < high < math.inf and 2 <= count <= MOST_ALPHAS):
        raise ValueError(f"{low}:{high}:{count} is no geometric series")
    ratio = high / low
    return [_rounded(low * ratio ** (step / (count - 1))) for step in range(count)]


def preferred(low: float, high: float) -> list[float]:
    """The E24 numbers from low to high, both included. Raises `ValueError` when there is none."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{low}:{high} is no range")
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    values = [_rounded(value * 10.0**decade) for decade in decades for value in E24]
    found = [value for value in values if low <= value <= high]
    if not found:
        raise ValueError(f"{low}:{high} holds no E24 number")
    return found


def layers_text(layers: tuple[int, ...]) -> str:
    """Blocks as `0,4-11`: runs with both ends."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
