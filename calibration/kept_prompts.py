"""What is kept of prompts that were run, so that the steered pass over them costs one token each, or no encoder.

The plan of SARSteer changes the last position alone; all that comes before is as it was. So the KV cache before the
last token, where there is room for it, and that token are enough; else what the audio encoder made of the clips.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from calibration.continuation import Past, fork, without_last_column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calibration.batches import Batch
    from calibration.prompt_passes import PromptPass

KEPT_BYTES = 1 << 30
"""KV caches and encoder outputs held in memory. Beyond that, encoder outputs go to a temporary file."""


@dataclass(frozen=True)
class KeptPrompts:
    """One batch: its KV cache before the last token with that token's inputs, or its encoder outputs."""

    batch: Batch
    past: Past | None
    last: dict[str, torch.Tensor]
    audio: Any


class KeptStore:
    """Keeps prompts of many batches; use as `with KeptStore.opened() as store`."""

    def __init__(self, folder: Path, kept_bytes: int) -> None:
        self._folder = folder
        self._room = kept_bytes
        self.kept: list[KeptPrompts] = []

    @classmethod
    @contextmanager
    def opened(cls, kept_bytes: int = KEPT_BYTES) -> Iterator[KeptStore]:
        """A store whose files are gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="sarsteer-") as folder:
            yield cls(Path(folder), kept_bytes)

    def keep(self, batch: Batch, prompts: PromptPass) -> None:
        """Keep what the steered pass over a batch needs."""
        past = prompts.past
        if past is not None:
            layers = [layer for layer in past.cache.layers if layer.is_initialized]
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            if size <= self._room:
                self._room -= size
                self.kept.append(KeptPrompts(batch, _moved(without_last_column(past)), prompts.last, None))
                return
        leaves, shape = pytree.tree_flatten(prompts.audio)
        tensors = {str(number): leaf for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        place: Path | None = None
        if size <= self._room:
            self._room -= size
            kept = {number: (tensor.cpu(), tensor.device) for number, tensor in tensors.items()}
        else:
            place = self._folder / f"{len(self.kept)}.safetensors"
            save_file({number: tensor.contiguous().cpu() for number, tensor in tensors.items()}, place)
            kept = {number: (torch.empty(0), tensor.device) for number, tensor in tensors.items()}
        others = [None if str(number) in tensors else leaf for number, leaf in enumerate(leaves)]
        self.kept.append(KeptPrompts(batch, None, {}, _Audio(place, kept, others, shape)))


@dataclass(frozen=True)
class _Audio:
    """Encoder outputs taken apart: tensors by number with their devices, all else in place, and how it was nested."""

    place: Path | None
    tensors: dict[str, tuple[torch.Tensor, torch.device]]
    others: list[Any]
    shape: Any

    def restored(self) -> list[Any]:
        """The outputs as the encoder returned them."""
        read = None if self.place is None else load_file(self.place)
        leaves = list(self.others)
        for number, (tensor, device) in self.tensors.items():
            leaves[int(number)] = (tensor if read is None else read[number]).to(device)
        outputs: list[Any] = pytree.tree_unflatten(leaves, self.shape)
        return outputs


def _moved(past: Past) -> Past:
    """The cache on the CPU; each layer goes back to where it was when `at_home` is asked."""
    for layer in past.cache.layers:
        if layer.is_initialized:
            layer.home = layer.keys.device
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
    return past


def at_home(past: Past) -> Past:
    """A cache to go on from, every layer on the device it came from."""
    cache = fork(past.cache)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.to(layer.home), layer.values.to(layer.home)
    return Past(cache, past.mask_BP)
