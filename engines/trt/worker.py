"""Run TensorRT's long calls in a thread of their own, so that an interrupt never strikes inside one.

TensorRT calls back into Python for its log and its progress. A KeyboardInterrupt raised there would be printed by
the bindings and lost; raised in the thread that waits, it ends the work in an orderly way.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")
POLL_SECONDS = 0.1


def run_interruptibly(work: Callable[[], Result], cancel: Callable[[], None] = lambda: None) -> Result:
    """Return what `work` returns, or raise what it raises.

    On an interrupt `cancel` is called, `work` is waited for, and the interrupt goes on.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    finished = (
        threading.Event()
    )  # not `join`: Python before 3.13 takes an interrupted join for the thread's end

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)
        finally:
            finished.set()

    worker = threading.Thread(target=run, name="TensorRT")
    try:
        worker.start()
        while not finished.wait(POLL_SECONDS):
            pass
    except BaseException:
        cancel()
        if worker.ident is not None:  # it had started
            finished.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
