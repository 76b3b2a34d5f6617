"""The clips of a calibration: read and checked once, kept while there is room, read again where there is not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

import torch

from calibration.states import check_clip, load_clips

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.lalm import Lalm
    from calibration.requests import OnError, RequestSet, SpokenRequest

KEPT_BYTES = 1 << 28
"""Samples kept in memory: an hour of 16 kHz audio."""


class Clips:
    """The samples of requests at the rate that a model hears, up to `kept_bytes` of them in memory.

    Several threads may read at the same time.
    """

    def __init__(self, lalm: Lalm, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._lalm = lalm
        self._room = kept_bytes
        self._kept: dict[SpokenRequest, NDArray[np.float32]] = {}
        self._samples: dict[SpokenRequest, int] = {}
        self._counting = Lock()

    def checked(self, data: RequestSet, on_error: OnError) -> RequestSet:
        """The set without the requests whose clips the model cannot take, as `RequestSet.checked`; all are read."""
        return data.checked(self.check, on_error, threads=torch.get_num_threads())

    def read(self, requests: Iterable[SpokenRequest]) -> None:
        """Check those that were not yet."""
        unread = [request for request in requests if request not in self._samples]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(self.check, unread):
                pass

    def check(self, request: SpokenRequest) -> None:
        """Read a clip, if the model hears. Raises `InputError` naming it when it is none that the model can take."""
        clip = check_clip(self._lalm, request)
        with self._counting:
            self._samples[request] = 0 if clip is None else clip.size
            if clip is not None and clip.nbytes <= self._room and request not in self._kept:
                self._room -= clip.nbytes
                self._kept[request] = clip

    def samples(self, request: SpokenRequest) -> int:
        """How many samples a clip has."""
        if request not in self._samples:
            self.check(request)
        return self._samples[request]

    def load(self, requests: Sequence[SpokenRequest]) -> list[NDArray[np.float32]] | None:
        """The clips of some requests, each (samples,) float32; None for a model that hears none."""
        if not self._lalm.hears:
            return None
        return [
            self._kept[request] if request in self._kept else load_clips(self._lalm, [request])[0]
            for request in requests
        ]
