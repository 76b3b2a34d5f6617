"""An audio encoder whose layers leave out the padding that no clip of the batch attends to.

Encoders of the Whisper kind take windows of fixed length, mostly silence behind a short clip. Where they are told by
a mask, what is hidden from every row cannot change the rest, unless a layer mixes neighbours by a convolution.

Dimensions: B batch, F frames of the window, A frames up to the last that any row attends to, D width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def trimmed(encoder: nn.Module | None) -> Iterator[None]:
    """Within the block, the layers of an encoder compute the frames (B, A, D) only; behind them come zeros.

    An encoder without a list `layers`, without a mask (B, 1, F, F) or with convolutions in its layers runs as ever.
    """
    layers = getattr(encoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or _mixes_neighbours(layers):
        yield
        return
    window = _Window()
    with ExitStack() as hooks:
        for layer in layers:
            handle: Any = layer.register_forward_pre_hook(window.cut, with_kwargs=True)
            hooks.callback(handle.remove)
        handle = layers[0].register_forward_pre_hook(window.measure, with_kwargs=True, prepend=True)
        hooks.callback(handle.remove)
        handle = layers[-1].register_forward_hook(window.fill)
        hooks.callback(handle.remove)
        yield


def _mixes_neighbours(layers: nn.ModuleList) -> bool:
    mixing = (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    return any(isinstance(module, mixing) for module in layers.modules())


class _Window:
    """How many frames the pass under way has, and how many of them any row attends to."""

    def __init__(self) -> None:
        self._frames = self._attended = 0

    def measure(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        mask: Any = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self._frames = self._attended = hidden.shape[1] if isinstance(hidden, torch.Tensor) else 0
        if self._is_mask(mask) and hidden.ndim == 3:
            attended_BF = (mask if mask.dtype == torch.bool else mask == 0).any(dim=-2)[:, 0]
            last = attended_BF.any(dim=0).nonzero()
            self._attended = int(last.max()) + 1 if len(last) else self._frames

    def cut(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._attended == self._frames:
            return None
        return tuple(map(self._cut, args)), {name: self._cut(value) for name, value in kwargs.items()}

    def fill(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        if self._attended == self._frames:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        whole = nn.functional.pad(hidden, (0, 0, 0, self._frames - self._attended))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _cut(self, value: Any) -> Any:
        if self._is_mask(value):
            return value[..., : self._attended, : self._attended]
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == self._frames:
            return value[:, : self._attended]
        return value

    def _is_mask(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.ndim == 4
            and tuple(value.shape[1:]) == (1, self._frames, self._frames)
        )
