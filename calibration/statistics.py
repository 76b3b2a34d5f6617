"""What steering plans are made from, in memory that does not grow with the data: sums that merge exactly.

Of harmful requests the sum of h(a, t + r) − h(a, t); of benign ones their count, mean and a root of their centred
scatter. Everything is float64, so that one by one, all at once or on several machines come to the same. Needs numpy
and safetensors only.

Dimensions: N requests, L decoder blocks, D width, K rows of a root, at most min(N, 2 D).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calibration.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

FORMAT = "sarsteer-statistics"
VERSION = 1
METADATA_KEY = "sarsteer"
TENSORS = ("refusal_sum_LD", "benign_mean_LD", "benign_root_LKD")


@dataclass(frozen=True)
class StateStatistics:
    """Sums over the last-position states of `pairs` harmful requests and `benign` others, float64.

    `refusal_sum_LD`: Σ h(a, t + r) − h(a, t). `benign_mean_LD`: mean of h. `benign_root_LKD`: rows R with
    Rᵀ R = Σ (h − mean)(h − mean)ᵀ of each block; their right singular vectors are those of the centred states.
    """

    pairs: int
    refusal_sum_LD: NDArray[np.float64]
    benign: int
    benign_mean_LD: NDArray[np.float64]
    benign_root_LKD: NDArray[np.float64]

    @classmethod
    def empty(cls, layers: int, width: int) -> StateStatistics:
        """The statistics of no request."""
        zero_LD = np.zeros((layers, width))
        return cls(0, zero_LD, 0, zero_LD, np.zeros((layers, 0, width)))

    @classmethod
    def of_pairs(cls, harmful_NLD: Floats, refused_NLD: Floats) -> StateStatistics:
        """The statistics of harmful requests: states without and with the refusal text."""
        count, layers, width = harmful_NLD.shape
        sum_LD = np.sum(refused_NLD.astype(np.float64) - harmful_NLD.astype(np.float64), axis=0)
        bare = cls.empty(layers, width)
        return cls(count, sum_LD, 0, bare.benign_mean_LD, bare.benign_root_LKD)

    @classmethod
    def of_benign(cls, benign_NLD: Floats) -> StateStatistics:
        """The statistics of benign requests."""
        count, layers, width = benign_NLD.shape
        states_NLD = benign_NLD.astype(np.float64)
        root_LKD = np.einsum("kn,nld->lkd", _contrasts(count), states_NLD)
        zero_LD = np.zeros((layers, width))
        return cls(0, zero_LD, count, states_NLD.mean(axis=0), _bounded(root_LKD))

    @property
    def layers(self) -> int:
        """L, the number of decoder blocks."""
        return int(self.refusal_sum_LD.shape[0])

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return int(self.refusal_sum_LD.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def merged(self, other: StateStatistics) -> StateStatistics:
        """The statistics of both sets of requests together."""
        if (self.layers, self.width) != (other.layers, other.width):
            raise InputError(
                f"statistics of {other.layers} blocks of width {other.width} do not go with those of "
                f"{self.layers} blocks of width {self.width}"
            )
        benign = self.benign + other.benign
        share = other.benign / benign if benign else 0.0
        apart_LD = other.benign_mean_LD - self.benign_mean_LD
        rows = [self.benign_root_LKD, other.benign_root_LKD]
        if self.benign and other.benign:  # what the two means add to the scatter
            rows.append(np.sqrt(self.benign * share) * apart_LD[:, None])
        return StateStatistics(
            pairs=self.pairs + other.pairs,
            refusal_sum_LD=self.refusal_sum_LD + other.refusal_sum_LD,
            benign=benign,
            benign_mean_LD=self.benign_mean_LD + share * apart_LD,
            benign_root_LKD=_bounded(np.concatenate(rows, axis=1)),
        )

    def refusal_direction(self, layer: int) -> NDArray[np.float32]:
        """v (D,) of a block: the mean paired difference (METHOD, calibration 1)."""
        return np.asarray(self.refusal_sum_LD[layer] / self.pairs, dtype=np.float32)

    def safe_basis(self, layer: int, rank: int) -> NDArray[np.float32]:
        """U (D, rank) of a block: the first left singular vectors of its centred, transposed states (step 2)."""
        return np.asarray(self._right_vectors[layer][:rank].T, dtype=np.float32, order="C")

    @cached_property
    def _right_vectors(self) -> list[NDArray[np.float64]]:
        return [np.linalg.svd(root_KD, full_matrices=False)[2] for root_KD in self.benign_root_LKD]

    def save(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Write the statistics to `path` (safetensors), whole or not at all; `provenance` is free JSON."""
        write_parts(path, [self], provenance)

    @classmethod
    def load(cls, path: Path) -> tuple[StateStatistics, dict[str, Any]]:
        """Read the statistics of a file and their provenance. Raises `InputError` for any other file."""
        parts, provenance = read_parts(path)
        return total(parts), provenance


def added(parts: Sequence[StateStatistics], batch: StateStatistics) -> tuple[StateStatistics, ...]:
    """Statistics to be merged, with one more: kept in parts of falling size, so that a row is copied log N times."""
    grown = [*parts, batch]
    while len(grown) > 1 and _size(grown[-1]) >= _size(grown[-2]):
        last = grown.pop()
        grown.append(grown.pop().merged(last))
    return tuple(grown)


def total(parts: Sequence[StateStatistics]) -> StateStatistics:
    """All parts merged. Raises `ValueError` when there are none."""
    if not parts:
        raise ValueError("there are no statistics to merge")
    return reduce(StateStatistics.merged, parts)


def write_parts(path: Path, parts: Sequence[StateStatistics], provenance: Mapping[str, Any]) -> None:
    """Write statistics that are still to be merged; the file appears whole or not at all."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "parts": [{"pairs": part.pairs, "benign": part.benign} for part in parts],
        "provenance": dict(provenance),
    }
    tensors = {
        f"parts.{index}.{name}": np.ascontiguousarray(getattr(part, name))
        for index, part in enumerate(parts)
        for name in TENSORS
    }
    partial = path.with_name(f"{path.name}.writing")
    try:
        partial.write_bytes(save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_parts(path: Path) -> tuple[list[StateStatistics], dict[str, Any]]:
    """Read what `write_parts` wrote. Raises `InputError` for a file that holds anything else."""
    try:
        with safe_open(path, framework="numpy") as opened:
            header = json.loads((opened.metadata() or {})[METADATA_KEY])
            if (header["format"], header["version"]) != (FORMAT, VERSION):
                raise InputError(
                    f"{path}: is {header['format']!r} version {header['version']}; expected {FORMAT} {VERSION}"
                )
            parts = [
                StateStatistics(
                    pairs=int(counts["pairs"]),
                    benign=int(counts["benign"]),
                    **{name: opened.get_tensor(f"parts.{index}.{name}") for name in TENSORS},
                )
                for index, counts in enumerate(header["parts"])
            ]
            provenance = dict(header["provenance"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no calibration statistics ({error})") from error
    if not parts or any(not _sound(part, parts[0]) for part in parts):
        raise InputError(f"{path}: its statistics are damaged; sizes disagree, or values are not finite")
    return parts, provenance


def _sound(part: StateStatistics, first: StateStatistics) -> bool:
    arrays = [getattr(part, name) for name in TENSORS]
    layers, width = first.refusal_sum_LD.shape if first.refusal_sum_LD.ndim == 2 else (0, 0)
    shapes = (
        part.refusal_sum_LD.shape == part.benign_mean_LD.shape == (layers, width)
        and part.benign_root_LKD.ndim == 3
        and part.benign_root_LKD.shape[::2] == (layers, width)
        and min(part.pairs, part.benign, layers - 1, width - 1) >= 0
    )
    return shapes and all(array.dtype == np.float64 and np.isfinite(array).all() for array in arrays)


def _contrasts(count: int) -> NDArray[np.float64]:
    """Orthonormal rows (N − 1, N), each orthogonal to the ones vector: times states, a root of their scatter."""
    rows = np.tri(max(count - 1, 0), count)
    number = np.arange(1, count)
    rows[number - 1, number] = -number
    return np.asarray(rows / np.sqrt(number * (number + 1))[:, None])


def _bounded(root_LKD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same scatter in at most D rows, once there are 2 D; so rarely, because it takes D³ operations a block."""
    _, rows, width = root_LKD.shape
    return root_LKD if rows < 2 * width else np.asarray(np.linalg.qr(root_LKD, mode="r"))


def _size(part: StateStatistics) -> int:
    return part.pairs + part.benign
