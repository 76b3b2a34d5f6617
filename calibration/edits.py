"""The edits of the residual stream that a plan is made of: one class per operation.

`docs/plan.md` defines what each computes. Needs numpy only. Dimensions: D width of the residual stream, K
rank of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from calibration.errors import InputError
from calibration.positions import Positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_STRENGTH = 1e30
"""Beyond this a strength is a mistake, and its products with a vector leave float32."""
ORTHONORMAL_ATOL = 1e-3
"""Largest |UᵀU − I| a basis may have; a float32 SVD stays below 1e-5; one rounded to bfloat16 does not."""


class Site(str, Enum):
    """Where in the decoder an edit acts."""

    BLOCK_INPUT = "block_input"
    BLOCK_OUTPUT = "block_output"
    FINAL_NORM_OUTPUT = "final_norm_output"


@dataclass(frozen=True, eq=False)
class Add:
    """`h ← h + strength · vector`.

    `layer`: 0-based decoder block. `vector`: (D,) float32. The product is formed in float32 and cast once
    to the dtype of the stream.
    """

    op: ClassVar[str] = "add"

    layer: int
    vector: NDArray[np.float32]
    strength: float = 1.0
    site: Site = Site.BLOCK_OUTPUT
    positions: Positions = Positions.LAST

    def __post_init__(self) -> None:
        _freeze(self, "vector")

    def __eq__(self, other: object) -> bool:
        return _same_edit(self, other)

    def __hash__(self) -> int:
        return hash((self.op, self.layer, self.site, self.positions, self.strength))

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tensors of this edit by their name in the file."""
        return {"vector": self.vector}

    def validate(self, where: str, hidden_size: int) -> None:
        """Raise `InputError` naming the tensor that is not finite or not of shape (D,)."""
        _check_tensor(f"{where}.vector", self.vector, (hidden_size,))
        with np.errstate(over="ignore"):
            scaled = np.float32(self.strength) * self.vector
        if not np.isfinite(scaled).all():
            raise InputError(
                f"{where}: strength {self.strength:g} times the vector overflows float32; lower the strength"
            )


@dataclass(frozen=True, eq=False)
class Project:
    """`h ← h − strength · U Uᵀ (h − mean)`.

    `basis` U: (D, K) float32 with orthonormal columns; `mean`: (D,) float32, zero when absent. Computed in
    float32 whatever the dtype of the stream, and cast once.
    """

    op: ClassVar[str] = "project"

    layer: int
    basis: NDArray[np.float32]
    mean: NDArray[np.float32] | None = None
    strength: float = 1.0
    site: Site = Site.BLOCK_OUTPUT
    positions: Positions = Positions.LAST

    def __post_init__(self) -> None:
        _freeze(self, "basis")
        if self.mean is not None:
            _freeze(self, "mean")

    def __eq__(self, other: object) -> bool:
        return _same_edit(self, other)

    def __hash__(self) -> int:
        return hash((self.op, self.layer, self.site, self.positions, self.strength))

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tensors of this edit by their name in the file."""
        return {"basis": self.basis} | ({} if self.mean is None else {"mean": self.mean})

    def validate(self, where: str, hidden_size: int) -> None:
        """Raise `InputError` naming the tensor that is not finite, of the wrong shape or not orthonormal."""
        if self.basis.ndim != 2 or not 1 <= self.basis.shape[1] <= hidden_size:
            raise InputError(
                f"{where}.basis has shape {self.basis.shape}; expected ({hidden_size}, K) "
                f"with 1 <= K <= {hidden_size}"
            )
        _check_tensor(f"{where}.basis", self.basis, (hidden_size, self.basis.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            gram_KK = self.basis.T @ self.basis
            deviation = float(np.abs(gram_KK - np.eye(len(gram_KK), dtype=np.float32)).max())
        if not deviation <= ORTHONORMAL_ATOL:  # NaN, from products that overflow, is refused too
            raise InputError(
                f"{where}.basis is not orthonormal: |UᵀU − I| is {deviation:.3g}, expected at most "
                f"{ORTHONORMAL_ATOL}; orthonormalise it first, e.g. `np.linalg.qr(basis)[0]`"
            )
        if self.mean is not None:
            _check_tensor(f"{where}.mean", self.mean, (hidden_size,))


Edit: TypeAlias = "Add | Project"
OPERATIONS: tuple[type[Add] | type[Project], ...] = (Add, Project)


def check_strength(where: str, value: object) -> None:
    """Raise `InputError` unless `value` is a finite number of at most `MAX_STRENGTH`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_STRENGTH:  # type: ignore[arg-type]
        raise InputError(f"{where} is {value!r}; expected a finite number of at most {MAX_STRENGTH:g}")


def edit_header(edit: Edit) -> dict[str, Any]:
    """What the file says of an edit beside its tensors."""
    return {
        "layer": edit.layer,
        "site": edit.site.value,
        "op": edit.op,
        "positions": edit.positions.value,
        "strength": float(edit.strength),
    }


def _same_edit(edit: Edit, other: object) -> bool:
    """Whether two edits do the same: equal headers and bit-equal tensors."""
    if not isinstance(other, OPERATIONS) or edit_header(edit) != edit_header(other):
        return False
    tensors, others = edit.tensors(), other.tensors()
    return tensors.keys() == others.keys() and all(
        tensor.shape == others[name].shape and tensor.tobytes() == others[name].tobytes()
        for name, tensor in tensors.items()
    )


def _freeze(edit: Edit, name: str) -> None:
    """Make the tensor a read-only float32 array, so that a frozen edit really is."""
    array = np.array(getattr(edit, name), dtype=np.float32, copy=True)
    array.setflags(write=False)
    object.__setattr__(edit, name, array)


def _check_tensor(where: str, tensor: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(f"{where} has shape {tensor.shape}; expected {shape}")
    bad = int(tensor.size - np.isfinite(tensor).sum())
    if bad:
        raise InputError(f"{where} has {bad} values that are NaN or infinite; expected finite values")
