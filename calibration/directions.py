"""From hidden states to steering vectors: the calibration equations of SARSteer (arXiv 2510.17633).

Sums and the safe subspace are float64, vectors float32; nothing is normalised: the strength alpha multiplies the raw
ablated vector.
Dimensions: N requests, L decoder blocks, D width, K rank of the safe subspace.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError
from calibration.plan import Add, SteeringPlan
from calibration.statistics import StateStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from calibration.states import CalibrationStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SteeringSettings:
    """How a plan is made from states: `alpha` strength, `ablation` lambda, `rank` k, blocks to steer.

    `layers` of None steers every block. `rank` 0 leaves the refusal direction unablated.
    """

    alpha: float = 0.1
    ablation: float = 1.0
    rank: int = 10
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"rank is {self.rank}; expected at least 0")
        for name, value in (("alpha", self.alpha), ("lambda", self.ablation)):
            if not np.isfinite(value):
                raise InputError(f"{name} is {value}; expected a finite number")


def refusal_direction(
    harmful_ND: NDArray[np.float32], refused_ND: NDArray[np.float32]
) -> NDArray[np.float32]:
    """v (D,): the mean paired difference that the refusal text makes over the same audio (step 1)."""
    return StateStatistics.of_pairs(harmful_ND[:, None], refused_ND[:, None]).refusal_direction(0)


def safe_basis(benign_ND: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """U (D, K): the first `rank` left singular vectors of the centred, transposed benign states (step 2).

    Raises `InputError` when `rank` is above N − 1, the rank of centred states.
    """
    limit = largest_rank(*benign_ND.shape)
    if rank > limit:
        raise InputError(f"rank is {rank}; {len(benign_ND)} centred benign states span at most {limit}")
    return StateStatistics.of_benign(benign_ND[:, None]).safe_basis(0, rank)


def ablate(
    direction_D: NDArray[np.float32], basis_DK: NDArray[np.float32], ablation: float
) -> NDArray[np.float32]:
    """v⊥ = v − λ U Uᵀ v (step 3), never normalised."""
    removed_D = basis_DK @ (basis_DK.T @ direction_D)
    return np.asarray(direction_D - np.float32(ablation) * removed_D, dtype=np.float32)


def largest_rank(benign: int, hidden_size: int) -> int:
    """The rank that `benign` centred states of width `hidden_size` can span."""
    return min(benign - 1, hidden_size)


def check_finite(name: str, states: NDArray[np.float32]) -> None:
    """Raise `InputError` when states over the `name` requests hold NaN or infinite values."""
    if not np.isfinite(states).all():
        raise InputError(
            f"the model's hidden states over the {name} requests hold NaN or infinite values; its dtype may be too "
            "narrow, calibrate in float32 or bfloat16"
        )


def statistics_of(states: CalibrationStates) -> StateStatistics:
    """The statistics of states held in memory. Raises `InputError` when one is not finite."""
    for name in ("harmful", "refused", "benign"):
        check_finite(name, getattr(states, f"{name}_NLD"))
    pairs = StateStatistics.of_pairs(states.harmful_NLD, states.refused_NLD)
    return pairs.merged(StateStatistics.of_benign(states.benign_NLD))


def steering_vectors(
    calibrated: CalibrationStates | StateStatistics, *, rank: int, ablation: float
) -> NDArray[np.float32]:
    """The ablated refusal direction v⊥ of every block, (L, D) float32, from states or their statistics.

    `rank` is clamped to N − 1, with a warning in the log. Raises `InputError` when a state is not finite.
    """
    found = calibrated if isinstance(calibrated, StateStatistics) else statistics_of(calibrated)
    limit = largest_rank(found.benign, found.width)
    if rank > limit:
        logger.warning(
            "rank %d is more than %d benign clips can span; using rank %d", rank, found.benign, limit
        )
    rank = min(rank, limit)
    return np.stack(
        [
            ablate(found.refusal_direction(layer), found.safe_basis(layer, rank), ablation)
            for layer in range(found.layers)
        ]
    )


def steering_plan(
    calibrated: CalibrationStates | StateStatistics,
    settings: SteeringSettings,
    provenance: Mapping[str, Any] | None = None,
) -> SteeringPlan:
    """The SARSteer plan: add α v⊥ to every chosen block's output at the last position.

    One set of statistics serves any number of settings. Raises `InputError` when a layer of `settings` is not a block
    of the model.
    """
    vectors_LD = steering_vectors(calibrated, rank=settings.rank, ablation=settings.ablation)
    num_layers, hidden_size = vectors_LD.shape
    layers = range(num_layers) if settings.layers is None else settings.layers
    if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise InputError(f"layer {outside[0]} does not exist; expected 0 to {num_layers - 1}")
    if twice := [layer for layer, count in Counter(layers).items() if count > 1]:
        raise InputError(f"layer {twice[0]} is named twice; expected each layer once")
    return SteeringPlan(
        hidden_size=hidden_size,
        num_layers=num_layers,
        edits=tuple(Add(layer=layer, vector=vectors_LD[layer], strength=settings.alpha) for layer in layers),
        provenance=provenance or {},
    )
