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
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from calibration.placement import input_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from calibration.lalm import Lalm

    Thing = TypeVar("Thing")
    Result = TypeVar("Result")
    Worker = TypeVar("Worker")

SMALL_PARAMETERS = 50_000_000
"""Up to here a model counts as small: its largest matrices take less than a millisecond on one core."""


def worker_count(lalm: Lalm) -> int:
    """How many batches are run at once: as many as there are threads for a small model on the CPU, else one."""
    small = sum(parameter.numel() for parameter in lalm.model.parameters()) <= SMALL_PARAMETERS
    return torch.get_num_threads() if small and input_device(lalm.model).type == "cpu" else 1


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


def in_order(
    workers: Sequence[Worker], things: Sequence[Thing], work: Callable[[Worker, Thing], Result]
) -> Iterator[tuple[Thing, Result]]:
    """Do all things, each by one worker, at the same time; results come in the order of the things.

    The first is done alone: what it finds out holds for all. Few results wait to be taken.
    """
    if not things:
        return
    yield things[0], work(workers[0], things[0])
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
        for thing in things[1:]:
            coming.append((thing, pool.submit(run, thing)))
            if len(coming) > len(workers):
                first, result = coming.popleft()
                yield first, result.result()
        for first, result in coming:
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
