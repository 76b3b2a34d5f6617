"""How much memory a piece of work needs: the process's peak resident set while it runs."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"
"""What Linux takes to forget the peak so far, see proc(5)."""


@dataclass
class Peak:
    """Resident memory in bytes: at the start, and at its highest; set when the block has ended."""

    start_bytes: int = 0
    peak_bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak resident memory of this process within the block.

    Where the system cannot forget earlier peaks (not Linux), the peak is that of the process's whole life; where it
    says nothing (Windows), 0.
    """
    with suppress(OSError):
        CLEAR.write_text(CLEAR_PEAK)
    peak = Peak(start_bytes=_resident("VmRSS"))
    try:
        yield peak
    finally:
        peak.peak_bytes = _resident("VmHWM")


def _resident(entry: str) -> int:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
