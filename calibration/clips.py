"""The clips of a calibration: read and checked once, kept while there is room, read again where there is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.audio import header_seconds
from calibration.states import check_clip, load_clips

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.lalm import Lalm
    from calibration.requests import SpokenRequest

KEPT_BYTES = 1 << 28
"""Samples kept in memory: an hour of 16 kHz audio."""


class Clips:
    """The samples of requests at the rate that a model hears, up to `kept_bytes` of them in memory."""

    def __init__(self, lalm: Lalm, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._lalm = lalm
        self._room = kept_bytes
        self._kept: dict[SpokenRequest, NDArray[np.float32]] = {}
        self._samples: dict[SpokenRequest, int] = {}

    def check(self, request: SpokenRequest) -> None:
        """Read a clip, if the model hears. Raises `InputError` naming it when it is none that the model can take."""
        clip = check_clip(self._lalm, request)
        if clip is None:
            self._samples[request] = 0
            return
        self._samples[request] = clip.size
        if clip.nbytes <= self._room and request not in self._kept:
            self._room -= clip.nbytes
            self._kept[request] = clip

    def samples(self, request: SpokenRequest) -> int:
        """How many samples a clip has; by its header, so about, when it was not checked."""
        if request not in self._samples and request.audio is not None and self._lalm.hears:
            return int(header_seconds(request.audio) * self._lalm.sampling_rate)
        return self._samples.get(request, 0)

    def load(self, requests: Sequence[SpokenRequest]) -> list[NDArray[np.float32]] | None:
        """The clips of some requests, each (samples,) float32; None for a model that hears none."""
        if not self._lalm.hears:
            return None
        return [
            self._kept[request] if request in self._kept else load_clips(self._lalm, [request])[0]
            for request in requests
        ]
