"""Calibration in several processes, as `torchrun` or `accelerate launch` start them: who does what, and who fails.

Models do not talk to each other here, only sums are put together at the end, on the CPU; so gloo serves GPUs too.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed

from calibration.errors import InputError, SarsteerError
from calibration.statistics import TENSORS, StateStatistics
from calibration.unfinished import Found

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest; one that fails says so, and is not waited for."""
POLL_SECONDS = 0.05
PARTING_SECONDS = 10.0
"""How long process 0, which may hold what the others talk through, waits for them to have heard the end."""


class OtherProcessError(SarsteerError):
    """Another process failed and has said why; this one has nothing to add."""

    silent = True


@dataclass
class Processes:
    """This process, number `rank` of `count`. Alone, nothing here does or waits for anything."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    _store: Any = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device for this process: with `cuda`, each of a machine takes the GPU of its number."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.count > 1 else device

    def share(self, things: Sequence[Any]) -> list[Any]:
        """Every `count`-th of some things, so that all processes have like shares of things in order of size."""
        return list(things[self.rank :: self.count])

    def finished(self, name: str, more: int) -> int:
        """Count what this process did; what all did so far."""
        return more if self._store is None else int(self._store.add(f"finished/{name}", more))

    def check(self) -> None:
        """Raise `OtherProcessError` when another process has failed."""
        if self._store is not None and self._failed():
            raise OtherProcessError("another process failed")

    def _failed(self) -> bool:
        try:
            return bool(self._store.check(["failed"]))
        except (RuntimeError, OSError):  # the store went away with the process that held it
            return True

    def wait(self, name: str) -> None:
        """Wait until all processes are here. Raises `OtherProcessError` when one will not come."""
        if self._store is None:
            return
        arrived = int(self._store.add(f"arrived/{name}", 1))
        while arrived < self.count:
            self.check()
            time.sleep(POLL_SECONDS)
            arrived = int(self._store.add(f"arrived/{name}", 0))

    def tell(self, name: str, values: Sequence[int] | None) -> list[int]:
        """Numbers that process 0 gives to all."""
        self.wait(name)
        size = self._from_first(np.array([0 if values is None else len(values)], dtype=np.int64))
        array = np.zeros(int(size[0]), dtype=np.int64)
        if self.first and values is not None:
            array[:] = values
        return [int(value) for value in self._from_first(array)]

    def joined(self, found: Found) -> Found:
        """What all processes found, in each of them: the same, bit for bit."""
        if self.count == 1:
            return found
        self.wait("joined")
        whole: Found | None = None
        for rank in range(self.count):
            other = self._sent(found, rank)
            whole = other if whole is None else whole.joined(other)
        assert whole is not None  # noqa: S101 - there is at least one process
        return whole

    def largest(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Elementwise the largest over all processes; NaN stays."""
        if self.count == 1:
            return values
        self.wait(name)
        found = [self._from(rank, values.copy()) for rank in range(self.count)]
        return np.asarray(np.maximum.reduce(found))

    def _sent(self, found: Found, rank: int) -> Found:
        mine = rank == self.rank
        head = [len(found.parts), len(found.harmful), len(found.benign)] if mine else [0, 0, 0]
        parts, harmful, benign = self._from(rank, np.array(head, dtype=np.int64)).tolist()
        rows = np.array([*sorted(found.harmful), *sorted(found.benign)] if mine else [0] * (harmful + benign))
        rows = self._from(rank, rows.astype(np.int64))
        received = [self._sent_part(found.parts[number] if mine else None, rank) for number in range(parts)]
        return Found(
            tuple(received),
            frozenset(rows[:harmful].tolist()),
            frozenset(rows[harmful:].tolist()),
            *(self._from(rank, array.copy()) for array in (found.largest_L, found.before_last_L)),
        )

    def _sent_part(self, part: StateStatistics | None, rank: int) -> StateStatistics:
        head = [0] * 5 if part is None else [part.pairs, part.benign, *part.benign_root_LKD.shape]
        pairs, benign, layers, rows, width = self._from(rank, np.array(head, dtype=np.int64)).tolist()
        shapes = ((layers, width), (layers, width), (layers, rows, width))
        arrays = {
            name: self._from(rank, np.zeros(shape) if part is None else getattr(part, name).copy())
            for name, shape in zip(TENSORS, shapes, strict=True)
        }
        return StateStatistics(pairs=pairs, benign=benign, **arrays)

    def _from_first(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._from(0, array)

    def _from(self, rank: int, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.count > 1 and array.size:
            torch.distributed.broadcast(torch.from_numpy(array), src=rank)
        return array


@contextmanager
def started_processes() -> Iterator[Processes]:
    """The processes that a launcher started, joined by gloo; this one alone where none did.

    When the block fails in one of them, the others end with `OtherProcessError`, and so does all but the first to fail.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield Processes()
        return
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    distributed: Any = torch.distributed
    try:
        store, rank, count = next(distributed.rendezvous("env://", rank, count, timeout=timedelta(minutes=5)))
        prefixed = distributed.PrefixStore("calibration", store)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the {count} processes that WORLD_SIZE speaks of cannot be joined ({error}); start them with torchrun, or "
            "unset WORLD_SIZE"
        ) from error
    processes = Processes(rank, count, local, prefixed)
    try:
        yield processes
        processes.wait("end")
    except BaseException as error:
        try:
            spoken = not isinstance(error, OtherProcessError) and int(prefixed.add("failures", 1)) == 1
            prefixed.set("failed", str(rank))
        except (RuntimeError, OSError):
            spoken = False
        if spoken:
            raise
        raise OtherProcessError("another process failed") from error
    finally:
        with suppress(RuntimeError, OSError):
            _part(prefixed, processes)
        torch.distributed.destroy_process_group()


def _part(store: Any, processes: Processes) -> None:
    left = int(store.add("left", 0 if processes.first else 1))
    deadline = time.monotonic() + PARTING_SECONDS
    while processes.first and left < processes.count - 1 and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        left = int(store.add("left", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise InputError(
            f"{name} is {text!r} in the environment; expected a number of a launcher such as torchrun"
        )
    return int(text)
