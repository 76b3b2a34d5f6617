"""The oracle of parity: the eager model, plain and steered, run on teacher-forced scripts.

Dimensions: B batch, S sequence of a step, T past and present, D width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from calibration.errors import UnsupportedError
from calibration.lalm import Lalm, encode_requests
from calibration.states import heard_clips
from calibration.steered import steered
from calibration.token_positions import position_ids
from engines.parity import Pair
from engines.torch_arrays import as_tensor, to_host
from engines.trace import LOGITS, Script, Trace
from graph_passes.attention import PER_LAYER_INPUTS
from sarsteer_export.exporting.components import DecoderComponent, EmbedTokensComponent
from sarsteer_export.exporting.contract import cache_output_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from calibration.decoder_parts import DecoderParts
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from graph_passes.residual_stream import ResidualStream


EMBEDS = "inputs_embeds"
EXTRA_PADDING = 3
"""Padded positions that every row of a parity batch has, beside what its neighbours' lengths make."""


class Padding(str, Enum):
    """On which side the prompts of a batch are padded to one length."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class OracleCase:
    """A script and what the eager model computes on it, unsteered and steered."""

    script: Script
    traces: Pair


@dataclass(frozen=True)
class _Prefill:
    """What a decoder reads of merged prompts: by input name (B, S, …), embeddings among them, and the mask (B, S)."""

    content: dict[str, torch.Tensor]
    mask: torch.Tensor


def oracle_case(
    lalm: Lalm,
    plan: SteeringPlan,
    requests: Sequence[SpokenRequest],
    *,
    padding: Padding,
    decode_steps: int,
    stream: ResidualStream | None = None,
) -> OracleCase:
    """Run the eager model on B requests: a prefill, then decode steps fed with the steered model's tokens.

    With `stream` the traces also hold every block's output, under the names of the graph's tensors.
    """
    prefill = _prefill(lalm, requests, padding)
    tensors = None if stream is None else [block.output for block in stream.blocks]
    script, edited = _greedy(lalm, plan, prefill, decode_steps, tensors, f"{padding.value} padding")
    baseline = _replay(lalm, None, script, tensors)
    return OracleCase(script, Pair(baseline=baseline, edited=edited))


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the eager model's decoder reads for B prompts, left-padded: by input name (B, S, …), and mask (B, S)."""

    content: dict[str, np.ndarray[Any, Any]]
    mask: np.ndarray[Any, Any]

    @property
    def embeds(self) -> np.ndarray[Any, Any]:
        """The embeddings (B, S, D)."""
        return self.content[EMBEDS]


def prompt_embeddings(lalm: Lalm, requests: Sequence[SpokenRequest]) -> PromptEmbeddings:
    """Run B requests through the eager model up to its decoder."""
    prefill = _left_padded(lalm, requests)
    content = {name: to_host(tensor) for name, tensor in prefill.content.items()}
    return PromptEmbeddings(content, to_host(prefill.mask))


def _left_padded(lalm: Lalm, requests: Sequence[SpokenRequest]) -> _Prefill:
    inputs = encode_requests(lalm, [request.text for request in requests], heard_clips(lalm, requests))
    if lalm.parts.position_axes > 1:
        inputs.pop("position_ids")  # the model makes its own of several axes, which are held against ours
    with torch.inference_mode():
        called = lalm.adapter.decoder_inputs(inputs)
        if called.get(EMBEDS) is None:  # a decoder that embeds tokens itself, no clip among them
            return _Prefill(_embedded(lalm, called["input_ids"]), inputs["attention_mask"])
    _check_positions(lalm, called.get("position_ids"), inputs["attention_mask"])
    content = {name: called[name] for name in (EMBEDS, PER_LAYER_INPUTS) if called.get(name) is not None}
    return _Prefill(content, inputs["attention_mask"])


def _embedded(lalm: Lalm, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a decoder reads of tokens (B, S), by input name."""
    embedded = EmbedTokensComponent(lalm.adapter)(ids)
    if isinstance(embedded, torch.Tensor):
        return {EMBEDS: embedded}
    return dict(zip((EMBEDS, PER_LAYER_INPUTS), embedded, strict=True))


def _check_positions(lalm: Lalm, told: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Hold the one axis of positions that graphs read against every axis that the model gives its decoder."""
    if told is None:
        return
    attended = mask.bool()
    if not (told[..., attended] == position_ids(mask)[attended]).all():
        raise UnsupportedError(
            f"{type(lalm.model).__name__}: its decoder is given positions that do not count attended tokens, equally "
            "on every axis; graphs with one axis of positions cannot do what it does"
        )


def _prefill(lalm: Lalm, requests: Sequence[SpokenRequest], padding: Padding) -> _Prefill:
    """A batch in which every row is padded: without padding, last column and last attended one are the same."""
    tight = _left_padded(lalm, requests)
    left = _Prefill(
        {name: _padded(tensor) for name, tensor in tight.content.items()},
        _padded(tight.mask[..., None])[..., 0],
    )
    if padding is Padding.LEFT:
        return left
    lengths = [int(length) for length in left.mask.sum(dim=1)]  # the same rows, their attended part in front

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(length, dims=0) for row, length in zip(tensor, lengths, strict=True)])

    return _Prefill({name: moved(tensor) for name, tensor in left.content.items()}, moved(left.mask))


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (B, S, …) with `EXTRA_PADDING` zeros before every row."""
    return torch.cat([torch.zeros_like(tensor[:, :1]).repeat_interleave(EXTRA_PADDING, dim=1), tensor], dim=1)


def _greedy(
    lalm: Lalm, plan: SteeringPlan, prefill: _Prefill, decode_steps: int, tensors: list[str] | None, name: str
) -> tuple[Script, Trace]:
    """Roll the steered model out greedily; the steps it took become the script."""
    content, mask = prefill.content, prefill.mask
    feeds, sequences = [], []
    with torch.inference_mode(), _EagerDecoder(lalm, plan, tensors) as decoder:
        for step in range(1 + decode_steps):
            sequence = content[EMBEDS].shape[1]
            feed = {
                **content,
                "attention_mask": mask,
                "position_ids": position_ids(mask)[:, -sequence:],
            }
            outputs = decoder.step(feed)
            feeds.append({key: to_host(value) for key, value in feed.items()})
            sequences.append(sequence)
            if step < decode_steps:
                last = (mask[:, -sequence:] * torch.arange(sequence, device=mask.device)).argmax(dim=1)
                tokens = as_tensor(outputs[LOGITS])[torch.arange(len(last)), last.cpu()].argmax(dim=-1)
                content = _embedded(lalm, tokens[:, None].to(mask.device))
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return Script(name, tuple(feeds), tuple(sequences)), decoder.trace()


def _replay(lalm: Lalm, plan: SteeringPlan | None, script: Script, tensors: list[str] | None) -> Trace:
    with torch.inference_mode(), _EagerDecoder(lalm, plan, tensors) as decoder:
        for feeds in script.steps:
            decoder.step({key: as_tensor(value).to(lalm.model.device) for key, value in feeds.items()})
        return decoder.trace()


class _EagerDecoder:
    """The model's decoder in eager PyTorch, steered or not, with its cache; steps are recorded."""

    def __init__(self, lalm: Lalm, plan: SteeringPlan | None, tensors: list[str] | None) -> None:
        self._lalm, self._plan, self._tensors = lalm, plan, tensors
        self._component = DecoderComponent(lalm.adapter)
        self._cache = DynamicCache()
        self._steps: list[dict[str, np.ndarray[Any, Any]]] = []
        self._stack = ExitStack()
        self._stream: dict[int, torch.Tensor] = {}

    def __enter__(self) -> _EagerDecoder:
        self._stack.enter_context(
            steered(self._lalm.parts, self._plan) if self._plan is not None else nullcontext()
        )
        # Entered after the steering hooks, so that it sees what they made of the stream.
        self._stream = self._stack.enter_context(_recorded_stream(self._lalm.parts))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, feeds: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        logits, self._cache = self._component(**feeds, past_key_values=self._cache)
        outputs = {LOGITS: to_host(logits)}
        for layer, name in enumerate(self._tensors or ()):
            outputs[name] = to_host(self._stream[layer])
        self._steps.append(outputs)
        return outputs

    def trace(self) -> Trace:
        layers: list[Any] = self._cache.layers
        names = cache_output_names(len(layers))
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        cache = {name: to_host(tensor) for name, tensor in zip(names, tensors, strict=True)}
        return Trace(tuple(self._steps), cache)


@contextmanager
def _recorded_stream(parts: DecoderParts) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block: what is read behind each decoder block, by block; all edits there included."""
    seen: dict[int, torch.Tensor] = {}

    def record(layer: int) -> Any:
        def hook(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    readers = [*parts.blocks[1:], parts.final_norm]
    handles = [
        reader.register_forward_pre_hook(record(layer), with_kwargs=True)
        for layer, reader in enumerate(readers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
