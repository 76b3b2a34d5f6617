"""How large the residual stream gets: what tells whether a narrow dtype holds it, and its square in a norm.

Measured per decoder block at every attended position, because the largest activations of language models
stand at early positions, and at three places: what the block reads, what the norms that are its direct
children read (the stream between attention and MLP; in sandwich blocks also the branches), and what it
returns, edits included. A norm is a child whose class is called one; where a model calls its norms
otherwise, only the stream between attention and MLP goes unmeasured.

Dimensions: L decoder blocks, B batch, S sequence, T past and present, D width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests
from calibration.states import heard_clips, hidden_of
from calibration.steered import steered
from calibration.token_positions import attended_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from calibration.decoder_parts import DecoderParts
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from calibration.states import Progress

SIGNIFICANT_DIGITS = 6
"""What is kept of a magnitude; float32 sums in another order differ in the seventh."""


class Measured(Enum):
    """What the pass under way is: which of its positions count, and as what.

    `PROMPT`: prompts, padded on the left. `HEAD`: only the beginning of prompts. `REFUSED`: prompts with the refusal
    text, or what comes behind their beginning. `NOTHING`: a pass that is not measured.
    """

    PROMPT = "prompt"
    HEAD = "head"
    REFUSED = "refused"
    NOTHING = "nothing"


class LargestMagnitudes:
    """The largest |h| of every decoder block over the forward passes seen so far.

    Kept twice: over all of them and, for the passes over prompts, over what comes before their last token. The latter
    is what steering of the last position leaves as it is.
    """

    def __init__(self, blocks: int) -> None:
        self._largest_L = torch.zeros(blocks)
        self._before_last_L = torch.zeros(blocks)
        self._mask_BT: torch.Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._measured = Measured.PROMPT
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pass: dict[int, torch.Tensor] = {}

    @contextmanager
    def taking(self, measured: Measured) -> Iterator[None]:
        """Within the block, passes count as `measured`."""
        self._end_pass()
        previous, self._measured = self._measured, measured
        try:
            yield
        finally:
            self._end_pass()
            self._measured = previous

    @contextmanager
    def forgotten_on_error(self) -> Iterator[None]:
        """What is measured within the block counts only if the block ends without an exception."""
        self._end_pass()
        before = self._largest_L, self._before_last_L
        try:
            yield
        except BaseException:
            self._pass.clear()
            self._largest_L, self._before_last_L = before
            raise

    def largest_L(self) -> NDArray[np.float32]:  # noqa: N802 - carries its dimension
        """The magnitudes (L,) as they are: 0 before the first pass, NaN or infinite where the stream is."""
        self._end_pass()
        return self._largest_L.numpy(force=True)

    def before_last_L(self) -> NDArray[np.float32]:  # noqa: N802 - carries its dimension
        """The magnitudes (L,) of prompts before their last token."""
        self._end_pass()
        return self._before_last_L.numpy(force=True)

    def include(self, largest_L: NDArray[np.float32], before_last_L: NDArray[np.float32]) -> None:
        """Take in what was measured elsewhere."""
        self._end_pass()
        self._largest_L = _larger(self._largest_L, torch.from_numpy(largest_L))
        self._before_last_L = _larger(self._before_last_L, torch.from_numpy(before_last_L))

    def per_block(self, *, steered: bool) -> list[float]:
        """The magnitudes of L blocks, rounded to a few significant digits.

        Raises `InputError` naming the first block whose stream is not finite; `steered` says in which runs.
        """
        largest_L = self.largest_L()
        if not np.isfinite(largest_L).all():
            raise InputError(
                f"the {'steered' if steered else 'unsteered'} residual stream holds NaN or infinite values in "
                f"block {int(np.argmin(np.isfinite(largest_L)))}; it overflows "
                f"{str(self._dtype).removeprefix('torch.')}, calibrate in float32 or bfloat16"
                + (", or lower alpha" if steered else "")
            )
        return [float(f"{largest:.{SIGNIFICANT_DIGITS}g}") for largest in largest_L]

    def see(self, layer: int, hidden_BSD: torch.Tensor) -> None:
        """Take in one tensor of a block, at the attended positions of the forward pass under way."""
        if self._measured is Measured.NOTHING:
            return
        # A block reads the very tensor that the one before it returned, and so does its first norm.
        if self._seen is None or self._seen[0] is not hidden_BSD:
            if self._pass and hidden_BSD.shape[:2] != next(iter(self._pass.values())).shape:
                self._end_pass()
            self._seen = (hidden_BSD, _peaks(hidden_BSD))
        peaks_BS, so_far_BS = self._seen[1], self._pass.get(layer)
        if so_far_BS is None:
            self._pass[layer] = peaks_BS
        elif so_far_BS is not peaks_BS:
            self._pass[layer] = _larger(so_far_BS, peaks_BS)
        self._dtype = hidden_BSD.dtype

    def _end_pass(self) -> None:
        """Reduce the peaks of all layers at once: a few operations per pass, not per tensor."""
        self._seen = None
        if not self._pass:
            return
        layers = list(self._pass)
        device = self._pass[layers[0]].device
        peaks_LBS = torch.stack([self._pass[layer].to(device) for layer in layers])
        self._pass.clear()
        if self._mask_BT is not None:
            attended_BS = self._mask_BT[:, -peaks_LBS.shape[-1] :].bool().to(device)
            peaks_LBS = torch.where(attended_BS, peaks_LBS, 0.0)
        self._largest_L = _raised(self._largest_L, layers, peaks_LBS)
        if self._measured in (Measured.PROMPT, Measured.HEAD):
            columns = peaks_LBS.shape[-1] - (self._measured is Measured.PROMPT)
            self._before_last_L = _raised(self._before_last_L, layers, peaks_LBS[..., :columns])

    def read_mask(self, _decoder: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder: note the attention mask (B, T); without one every position counts."""
        mask = attended_tokens(kwargs.get("attention_mask"))
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise UnsupportedError(
                "measuring the residual stream needs the decoder's 2-D attention mask [batch, past + sequence]; "
                f"got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self._end_pass()
        self._mask_BT = mask


def _peaks(hidden_BSD: torch.Tensor) -> torch.Tensor:
    # Not vector_norm, which takes 18 times as long on a CPU, nor abs, which makes another such tensor.
    stream_BSD = hidden_BSD.detach()
    return torch.maximum(stream_BSD.amax(dim=-1), stream_BSD.amin(dim=-1).neg()).float()


def _raised(kept_L: torch.Tensor, layers: list[int], peaks_LBS: torch.Tensor) -> torch.Tensor:
    """What is kept, with the largest peaks of some layers."""
    if not peaks_LBS.numel():
        return kept_L
    found_L = torch.zeros_like(kept_L, device=peaks_LBS.device)
    found_L[layers] = peaks_LBS.amax(dim=(1, 2))
    return _larger(kept_L, found_L)


def _larger(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Elementwise, on the device of the second; NaN stays."""
    return torch.maximum(one.to(other.device), other)


@contextmanager
def recorded_magnitudes(parts: DecoderParts) -> Iterator[LargestMagnitudes]:
    """Within the block, every forward pass of the decoder is measured.

    Entered inside `steered`, it sees the edited stream.
    """
    record = LargestMagnitudes(len(parts.blocks))
    with ExitStack() as hooks:
        handle: Any = parts.decoder.register_forward_pre_hook(record.read_mask, with_kwargs=True)
        hooks.callback(handle.remove)
        for layer, block in enumerate(parts.blocks):
            norms = [child for child in block.children() if "norm" in type(child).__name__.lower()]
            for reader in (block, *norms):
                handle = reader.register_forward_pre_hook(
                    partial(_see_input, record, layer), with_kwargs=True
                )
                hooks.callback(handle.remove)
            handle = block.register_forward_hook(partial(_see_output, record, layer))
            hooks.callback(handle.remove)
        yield record


def steered_magnitudes(
    lalm: Lalm,
    requests: Sequence[SpokenRequest],
    plan: SteeringPlan,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[float]:
    """Run requests through the steered model: the largest |h| of every block, in plain numbers.

    Raises `InputError` when the steered stream overflows the model's dtype.
    """
    with steered(lalm.parts, plan), recorded_magnitudes(lalm.parts) as record, torch.inference_mode():
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            texts = [request.text for request in batch]
            lalm.model(**encode_requests(lalm, texts, heard_clips(lalm, batch)), use_cache=False)
            if progress is not None:
                progress("steered", start + len(batch), len(requests))
    return record.per_block(steered=True)


def _see_input(
    record: LargestMagnitudes,
    layer: int,
    _module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    record.see(layer, args[0] if args else kwargs["hidden_states"])


def _see_output(
    record: LargestMagnitudes, layer: int, _block: torch.nn.Module, _args: Any, output: Any
) -> None:
    record.see(layer, hidden_of(output))
