"""Every clip is heard once: its features are extracted once, its encoder outputs are kept and given out again."""

from __future__ import annotations

import copy
import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration import short_window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calibration.lalm import Lalm

EXTRACTORS = ("feature_extractor", "audio_processor")
"""What processors call the part that takes samples."""


@contextmanager
def encoder_outputs_recorded(lalm: Lalm) -> Iterator[list[Any]]:
    """Within the block, the list grows by what each call of the audio encoder returns."""
    outputs: list[Any] = []
    encoder = _encoder(lalm)
    if encoder is None:
        yield outputs
        return
    run = encoder.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        outputs.append(run(*args, **kwargs))
        return outputs[-1]

    with _forward_replaced(encoder, record):
        yield outputs


@contextmanager
def encoder_outputs_replayed(lalm: Lalm, outputs: list[Any]) -> Iterator[None]:
    """Within the block, the audio encoder returns what it returned before, call by call, and computes nothing.

    Raises `RuntimeError` when it is called more often than it was.
    """
    encoder = _encoder(lalm)
    if encoder is None:
        yield
        return
    rest = iter(outputs)

    def replay(*_args: Any, **_kwargs: Any) -> Any:
        try:
            # A shallow copy: a model may put more into the output it is given.
            return copy.copy(next(rest))
        except StopIteration:
            raise RuntimeError("the audio encoder is called more often than in the pass before") from None

    with _forward_replaced(encoder, replay):
        yield


@contextmanager
def features_extracted_once(lalm: Lalm) -> Iterator[None]:
    """Within the block, features of the same samples are extracted once, however often they are asked for.

    And silence that pads short clips is not computed over and over (`calibration/short_window.py`).
    """
    processor = lalm.processor
    found = {
        name: extractor
        for name in EXTRACTORS
        if callable(extractor := getattr(processor, name, None)) and name in vars(processor)
    }
    for name, extractor in found.items():
        setattr(processor, name, _Remembering(extractor))
    try:
        yield
    finally:
        for name, extractor in found.items():
            setattr(processor, name, extractor)


class _Remembering:
    """A feature extractor that remembers what it made of which samples."""

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _digest(args, kwargs)
        if key is None:
            return short_window.extract(self._extractor, *args, **kwargs)
        if key not in self._made:
            self._made[key] = short_window.extract(self._extractor, *args, **kwargs)
        made = copy.copy(self._made[key])
        if hasattr(made, "data"):  # a processor takes out and renames what it is given
            made.data = dict(made.data)
        return made


def _digest(*values: Any) -> str | None:
    """A content hash of arguments, or None where they hold what has none."""
    digest = hashlib.sha256()

    def read(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            value = value.numpy(force=True)
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
            return bool(value.dtype != object)
        if isinstance(value, dict):
            return all(read(str(name)) and read(value[name]) for name in sorted(value, key=str))
        if isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            return all(map(read, value))
        digest.update(f"{value!r}\0".encode())
        return value is None or isinstance(value, bool | int | float | str)

    return digest.hexdigest() if all(map(read, values)) else None


def _encoder(lalm: Lalm) -> torch.nn.Module | None:
    parts = lalm.adapter.audio_parts
    return None if parts is None else parts.encoder


@contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """As its own `forward` and not as a hook: a hook cannot keep a module from computing."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
