"""The fewest forward passes that give the last-position states of prompts, with and without the refusal text.

What all prompts begin with is run once; every clip is heard once; the refusal text is run on from the KV cache of its
prompt. Whether a model allows that is seen twice: by rules (`calibration/continuation.py`) and, on the first batch, by
comparing with whole passes. A model that does not is run in full, and the log says why.

Dimensions: B batch, L decoder blocks, D width.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calibration.audio_once import encoder_outputs_recorded, encoder_outputs_replayed
from calibration.continuation import (
    CannotContinueError,
    Past,
    Prompts,
    common_length,
    for_rows,
    fork,
    rest_of,
    shared_lengths,
    up_to,
)
from calibration.errors import SarsteerError
from calibration.magnitudes import LargestMagnitudes, Measured
from calibration.states import recorded_last_states
from calibration.trimmed_encoder import trimmed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calibration.lalm import Lalm

    Inputs = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)

CLOSE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far states of continued and whole passes may be apart, in parts of what the refusal text changes.

In float32 a state is the same to a few 1e-6; in the narrow types one rounding (5e-4, 4e-3) is repeated over the blocks
and measured against a change that may be a tenth of the state. What is wrong, not rounded, is off by 1 and more.
"""
ROUNDINGS = 2
"""And this many roundings of the state itself, for blocks in which the refusal text changes little."""
LEAST_CHANGE = 0.1
"""What the refusal text is taken to change, in parts of the state, where prompts are run without it."""


@dataclass(frozen=True)
class PromptPass:
    """A pass over prompts: states (B, L, D) float32 on the CPU and, for who goes on from it, its end and its audio.

    `past`: the cache with all tokens, or None after a whole pass. `last`: inputs (B, 1) of the last token.
    """

    states_BLD: torch.Tensor
    past: Past | None
    last: Inputs
    audio: list[Any]


@dataclass
class Verdict:
    """Whether prompts can be run on from a cache: why not, or what of it was seen to give what whole passes give.

    `prompts`: going on from what all begin with. `pairs`: that, and going on with the refusal text.
    """

    obstacle: str | None = None
    prompts: bool = False
    pairs: bool = False


class PromptPasses:
    """Runs prompts through a model, each with the least work; use inside `prepared`.

    `record` measures the residual stream of every pass. `verdict` is shared by those who run the same model.
    """

    def __init__(self, lalm: Lalm, record: LargestMagnitudes, verdict: Verdict | None = None) -> None:
        self._lalm = lalm
        self._record = record
        self._head = _Head(lalm)
        self._verdict = verdict or Verdict()

    @property
    def obstacle(self) -> str | None:
        """Why prompts are run in full, or None."""
        return self._verdict.obstacle

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within the block, no pass computes what nobody asks for: logits before the last, silence in an encoder."""
        audio = self._lalm.adapter.audio_parts
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(trimmed(None if audio is None else audio.encoder))
            handle: Any = self._lalm.parts.lm_head.register_forward_pre_hook(_last_position)
            stack.callback(handle.remove)
            yield

    def single(self, inputs: Inputs) -> PromptPass:
        """Run prompts that nothing is added to; the first ones in full, too, where no pairs came before them."""
        with self._falling_back(checked=self._verdict.prompts):
            if self._verdict.obstacle is None:
                prompt = self._from_head(Prompts.of(inputs))
                if not self._verdict.prompts:
                    self._compare_prompts(prompt, inputs)
                    self._verdict.prompts = True
                return prompt
        return self._whole(inputs, Measured.PROMPT)

    def pair(self, inputs: Inputs, longer: Inputs) -> tuple[PromptPass, torch.Tensor]:
        """Run prompts, and the same with the refusal text: their states (B, L, D). The first ones in full, too."""
        with self._falling_back(checked=self._verdict.pairs):
            if self._verdict.obstacle is None:
                found = self._continued(inputs, longer)
                if not self._verdict.pairs:
                    self._compare_pairs(found, inputs, longer)
                    self._verdict.prompts = self._verdict.pairs = True
                return found
        prompt = self._whole(inputs, Measured.PROMPT)
        with encoder_outputs_replayed(self._lalm, prompt.audio):
            refused = self._whole(longer, Measured.REFUSED)
        return prompt, refused.states_BLD

    def replayed(self, inputs: Inputs, audio: list[Any]) -> None:
        """Run prompts in full, whose clips were heard before; for the measurements alone."""
        with encoder_outputs_replayed(self._lalm, audio):
            self._whole(inputs, Measured.PROMPT)

    def whole(self, inputs: Inputs) -> None:
        """Run prompts in full, clips included; for the measurements alone."""
        self._whole(inputs, Measured.PROMPT)

    @contextmanager
    def _falling_back(self, *, checked: bool) -> Iterator[None]:
        """Give up on caches, and go on behind the block, where what it runs cannot be gone on from or is wrong.

        What was measured of it is forgotten. A model that was `checked` may fail only by the rules.
        """
        try:
            with self._record.forgotten_on_error():
                yield
        except CannotContinueError as reason:
            self._give_up(str(reason))
        except (SarsteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model's own code refuses part of a prompt as it likes
            if checked:
                raise
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self._verdict.obstacle = " ".join(reason.split())
        logger.warning("every prompt is run in full: %s", self._verdict.obstacle)

    def _from_head(self, prompts: Prompts) -> PromptPass:
        past = self._head.past(prompts, self._record)
        lengths = [0 if past is None else past.mask_BP.shape[1]] * len(prompts.tokens)
        rest = rest_of(prompts, lengths, past)
        with encoder_outputs_recorded(self._lalm) as audio:
            states_BLD, cache = self._run({**rest, **prompts.audio}, Measured.PROMPT, cached=True)
        fork(cache)  # refuses, before anything is built on it, what cannot be gone on from
        last = {"input_ids": rest["input_ids"][:, -1:], "position_ids": rest["position_ids"][..., -1:]}
        return PromptPass(states_BLD, Past(cache, rest["attention_mask"]), last, audio)

    def _continued(self, inputs: Inputs, longer: Inputs) -> tuple[PromptPass, torch.Tensor]:
        prompts, others = Prompts.of(inputs), Prompts.of(longer)
        lengths = shared_lengths(prompts, others, self._lalm.adapter.audio_token_id)
        prompt = self._from_head(prompts)
        assert prompt.past is not None  # noqa: S101 - `_from_head` always has one
        rest = rest_of(others, lengths, up_to(prompt.past, lengths))
        refused_BLD, _ = self._run(rest, Measured.REFUSED, cached=True)
        return prompt, refused_BLD

    def _compare_prompts(self, prompt: PromptPass, inputs: Inputs) -> None:
        whole_BLD = self._heard_again(inputs, prompt.audio)
        size_BL = whole_BLD.norm(dim=-1)
        dtype = self._lalm.model.dtype
        allowed_BL = (_close(dtype) * LEAST_CHANGE + ROUNDINGS * torch.finfo(dtype).eps) * size_BL
        _check_close((prompt.states_BLD, whole_BLD), allowed_BL, (size_BL, "their size"))

    def _compare_pairs(self, found: tuple[PromptPass, torch.Tensor], inputs: Inputs, longer: Inputs) -> None:
        prompt, refused_BLD = found
        whole_BLD = self._heard_again(inputs, prompt.audio)
        whole_refused_BLD = self._heard_again(longer, prompt.audio)
        change_BL = (whole_refused_BLD - whole_BLD).norm(dim=-1)
        dtype = self._lalm.model.dtype
        allowed_BL = _close(dtype) * change_BL + ROUNDINGS * torch.finfo(dtype).eps * whole_BLD.norm(dim=-1)
        for pair in ((prompt.states_BLD, whole_BLD), (refused_BLD, whole_refused_BLD)):
            _check_close(pair, allowed_BL, (change_BL, "what the refusal text changes"))

    def _heard_again(self, inputs: Inputs, audio: list[Any]) -> torch.Tensor:
        """States (B, L, D) of prompts that are run in full, unmeasured, with clips that were heard before."""
        with encoder_outputs_replayed(self._lalm, audio):
            return self._whole(inputs, Measured.NOTHING).states_BLD

    def _whole(self, inputs: Inputs, measured: Measured) -> PromptPass:
        with encoder_outputs_recorded(self._lalm) as audio:
            states_BLD, _ = self._run(inputs, measured, cached=False)
        return PromptPass(states_BLD, None, {}, audio)

    def _run(self, inputs: Inputs, measured: Measured, *, cached: bool) -> tuple[torch.Tensor, Any]:
        with recorded_last_states(self._lalm.parts) as last_LBD, self._record.taking(measured):
            output: Any = self._lalm.model(**inputs, use_cache=cached)
        states_BLD = torch.stack([state_BD.cpu() for state_BD in last_LBD], dim=1)
        return states_BLD, getattr(output, "past_key_values", None)


class _Head:
    """The KV cache of the tokens that all prompts begin with: those of a template before the first clip."""

    def __init__(self, lalm: Lalm) -> None:
        self._lalm = lalm
        self._tokens: tuple[int, ...] = ()
        self._past: Past | None = None

    def past(self, prompts: Prompts, record: LargestMagnitudes) -> Past | None:
        """The cache for these rows, or None when they have no beginning in common, or only one that is new and short.

        It is run when the beginning is not that of the rows before.
        """
        rows = prompts.tokens
        token = self._lalm.adapter.audio_token_id
        most = min(row.index(token) if token in row else len(row) - 1 for row in rows)
        begins = [row[:most] for row in rows]
        if self._past is None or any(row[: len(self._tokens)] != self._tokens for row in begins):
            self._tokens = begins[0][: common_length(begins)]
            self._past = self._run(prompts, record) if self._tokens else None
        return None if self._past is None else for_rows(self._past, len(rows))

    def _run(self, prompts: Prompts, record: LargestMagnitudes) -> Past:
        length = len(self._tokens)
        ids = prompts.inputs["input_ids"]
        mask = torch.ones(1, length, dtype=prompts.inputs["attention_mask"].dtype, device=ids.device)
        with record.taking(Measured.HEAD):
            output: Any = self._lalm.model(
                input_ids=torch.tensor([self._tokens], dtype=ids.dtype, device=ids.device),
                attention_mask=mask,
                position_ids=prompts.positions(0, 0, length)[..., None, :],
                use_cache=True,
            )
        return Past(output.past_key_values, mask)


def _close(dtype: torch.dtype) -> float:
    return CLOSE.get(dtype, CLOSE[torch.float32])


def _check_close(
    pair: tuple[torch.Tensor, torch.Tensor], allowed_BL: torch.Tensor, scale: tuple[torch.Tensor, str]
) -> None:
    """Raise `CannotContinueError` where states (B, L, D) are not as the second ones, where those are finite."""
    got_BLD, wanted_BLD = pair
    apart_BL = (got_BLD - wanted_BLD).norm(dim=-1)
    close_BL = (apart_BL <= allowed_BL) | ~wanted_BLD.isfinite().all(dim=-1)
    if not bool(close_BL.all()):
        scale_BL, name = scale
        share = float((apart_BL / scale_BL.clamp(min=1e-30)).max())
        raise CannotContinueError(
            f"run on from a cache, the states of the first prompts are off by {share:.1e} of {name}"
        )


def _last_position(_head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 3:
        return (args[0][:, -1:], *args[1:])
    return None
