"""A calibration that was interrupted: what it had found, and of which inputs, in a file beside its output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import InputError
from calibration.statistics import StateStatistics, added, read_parts, write_parts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Found:
    """What is known so far: statistics to be merged, the requests in them, and magnitudes (L,) of the stream."""

    parts: tuple[StateStatistics, ...]
    harmful: frozenset[int]
    benign: frozenset[int]
    largest_L: NDArray[np.float32]
    before_last_L: NDArray[np.float32]

    @classmethod
    def nothing(cls, layers: int) -> Found:
        """Before the first batch."""
        zero_L = np.zeros(layers, dtype=np.float32)
        return cls((), frozenset(), frozenset(), zero_L, zero_L)

    @property
    def count(self) -> int:
        """How many requests are in it."""
        return len(self.harmful) + len(self.benign)

    def disjoint(self, other: Found) -> bool:
        """Whether no request is in both."""
        return not (self.harmful & other.harmful or self.benign & other.benign)

    def joined(self, other: Found) -> Found:
        """Both together."""
        parts = self.parts
        for part in other.parts:
            parts = added(parts, part)
        return Found(
            parts,
            self.harmful | other.harmful,
            self.benign | other.benign,
            np.maximum(self.largest_L, other.largest_L),
            np.maximum(self.before_last_L, other.before_last_L),
        )


@dataclass(frozen=True)
class UnfinishedFile:
    """Where an unfinished calibration is kept: `path` for process 0, the same with `.N` behind it for process N.

    `key`: all that the statistics depend on, as JSON. A file with another key is never gone on from.
    """

    path: Path
    key: Mapping[str, Any]

    def of_process(self, rank: int) -> Path:
        """The file of one process."""
        return self.path if rank == 0 else self.path.with_name(f"{self.path.name}.{rank}")

    def files(self) -> list[Path]:
        """The files that are there, of however many processes."""
        numbered = self.path.parent.glob(f"{self.path.name}.*")
        found = [file for file in numbered if file.name[len(self.path.name) + 1 :].isdigit()]
        return [file for file in (self.path, *sorted(found)) if file.is_file()]

    def load(self) -> Found | None:
        """What earlier runs found, or None. Raises `InputError` when it is of other inputs, or damaged.

        A file whose requests are all in another one is of an earlier run still; it is left out.
        """
        loaded: list[Found] = []
        for file in self.files():
            found = self._read(file)
            if all(found.disjoint(other) for other in loaded):
                loaded.append(found)
        if not loaded:
            return None
        whole = loaded[0]
        for found in loaded[1:]:
            whole = whole.joined(found)
        return whole

    def save(self, found: Found, rank: int) -> None:
        """Write what one process found."""
        path = self.of_process(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        provenance = {
            "key": dict(self.key),
            "harmful": sorted(found.harmful),
            "benign": sorted(found.benign),
            "largest": found.largest_L.tolist(),
            "before_last": found.before_last_L.tolist(),
        }
        write_parts(path, found.parts, provenance)

    def remove(self) -> None:
        """Remove the files of all processes."""
        for file in self.files():
            file.unlink(missing_ok=True)

    def _read(self, file: Path) -> Found:
        anew = "remove it, or start anew with --no-resume"
        try:
            parts, kept = read_parts(file)
            found = Found(
                tuple(parts),
                frozenset(map(int, kept["harmful"])),
                frozenset(map(int, kept["benign"])),
                *(np.asarray(kept[name], dtype=np.float32) for name in ("largest", "before_last")),
            )
            key = dict(kept["key"])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{file}: no unfinished calibration can be read from it ({error}); {anew}"
            ) from error
        wanted = json.loads(json.dumps(dict(self.key)))
        if other := sorted(name for name in {*key, *wanted} if key.get(name) != wanted.get(name)):
            raise InputError(
                f"{file}: holds an unfinished calibration of other inputs ({', '.join(other)}); finish that one, {anew}"
            )
        sizes = (sum(part.pairs for part in parts), sum(part.benign for part in parts))
        if sizes != (len(found.harmful), len(found.benign)):
            raise InputError(f"{file}: its counts disagree with its requests; {anew}")
        return found
