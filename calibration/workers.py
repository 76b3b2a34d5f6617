"""Several batches at once on the cores of one machine, where one batch is too small to keep them busy.

The matrices of a small model are not worth being split among cores: each core runs batches of its own instead, on a
copy of the model that has modules and hooks of its own and shares every weight.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from calibration.placement import input_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from calibration.lalm import Lalm

Worker = TypeVar("Worker")
Thing = TypeVar("Thing")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

SMALL_PARAMETERS = 50_000_000
"""Up to here a model counts as small: its largest matrices take less than a millisecond on one core."""


BATCH_SIZE = 16
"""Requests per pass; one with 30 s of audio takes 0.4 GB of KV cache in a model of 7 billion parameters (float16)."""
SMALL_BATCH_SIZES = (8, 32)
"""The same for a small model: enough rows that a pass is not mostly overhead, few enough to stay in a core's cache."""


def worker_count(lalm: Lalm) -> int:
    """How many batches are run at once: as many as there are threads for a small model on the CPU, else one."""
    return torch.get_num_threads() if _small_on_cpu(lalm) else 1


def default_batch_size(lalm: Lalm, requests: int) -> int:
    """How many of so many requests go into one pass: of a small model, so many that every worker has two passes."""
    if not _small_on_cpu(lalm):
        return BATCH_SIZE
    least, most = SMALL_BATCH_SIZES
    return max(least, min(most, -(-requests // (2 * worker_count(lalm)))))


def _small_on_cpu(lalm: Lalm) -> bool:
    small = sum(parameter.numel() for parameter in lalm.model.parameters()) <= SMALL_PARAMETERS
    return small and input_device(lalm.model).type == "cpu"


def sharing_weights(lalm: Lalm) -> Lalm:
    """The same model with modules of its own, which may be hooked and run at the same time; no weight is copied."""
    tensors = chain(lalm.model.parameters(), lalm.model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return dataclasses.replace(
        lalm, model=copy.deepcopy(lalm.model, shared), processor=copy.deepcopy(lalm.processor)
    )


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within the block, PyTorch splits no operation among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FirstAlone(Generic[Worker, Thing, Prepared, Result]):
    """Work for `in_order`: each thing is prepared, then done; none is done before the `first` one is.

    Where doing that one tells how the others are to be done.
    """

    def __init__(
        self,
        prepare: Callable[[Worker, Thing], Prepared],
        do: Callable[[Worker, Prepared], Result],
        first: Thing,
    ) -> None:
        self._prepare, self._do, self._first = prepare, do, first
        self._first_done = Event()

    def __call__(self, worker: Worker, thing: Thing) -> Result:
        """Prepare and do one thing."""
        if thing is self._first:
            try:
                return self._do(worker, self._prepare(worker, thing))
            finally:
                self._first_done.set()
        prepared = self._prepare(worker, thing)
        self._first_done.wait()
        return self._do(worker, prepared)


def in_order(
    workers: Sequence[Worker], things: Sequence[Thing], work: Callable[[Worker, Thing], Result]
) -> Iterator[tuple[Thing, Result]]:
    """Do all things, each by one worker, at the same time; results come in the order of the things.

    Few results wait to be taken.
    """
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(thing: Thing) -> Result:
        worker = idle.get()
        try:
            with torch.inference_mode():  # each thread has its own
                return work(worker, thing)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(max_workers=len(workers))
    try:
        coming: deque[tuple[Thing, Future[Result]]] = deque()
        for thing in things:
            coming.append((thing, pool.submit(run, thing)))
            if len(coming) > len(workers):
                first, result = coming.popleft()
                yield first, result.result()
        for first, result in coming:
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
