"""The eager steered model: a plan applied to a Hugging Face model by hooks. It is the oracle of parity.

Dimensions: B batch, S sequence of this forward pass, T past and present, D width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from calibration.decoder_parts import DecoderParts, find_decoder
from calibration.errors import InputError, UnsupportedError
from calibration.plan import Add, Edit, Positions, Site, SteeringPlan, check_plan_fits
from calibration.states import hidden_of
from calibration.token_positions import attended_tokens, selected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Steer = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def steered(
    model: torch.nn.Module | DecoderParts,
    plan: SteeringPlan,
    *,
    strength: torch.Tensor | None = None,
    prompt_lengths: torch.Tensor | None = None,
) -> Iterator[None]:
    """Within the block, every forward pass of `model` is steered by `plan`; afterwards it is as before.

    `model`: a transformers model, or the parts of one (`Lalm.parts`), whatever names them.
    Acts in prefill and in every decode step, `generate` included. `strength`: factors of the plan's strengths,
    per row (B,) or per row and edit (B, E); a row whose factor is 0 is left as it is. `prompt_lengths`: attended
    prompt tokens per row (B,); by default a pass without past is the whole prompt. Raises `InputError` when the
    plan is for a decoder of another width or depth.
    """
    parts = model if isinstance(model, DecoderParts) else find_decoder(model)
    check_plan_fits(plan, hidden_size=parts.hidden_size, num_layers=len(parts.blocks))
    if strength is not None and (
        strength.ndim not in (1, 2) or strength.shape[1:] not in ((), (len(plan.edits),))
    ):
        raise InputError(
            f"strength has shape {tuple(strength.shape)}; expected (batch,) or (batch, {len(plan.edits)})"
        )
    window = _Window(prompt_lengths)
    lowered = [_Lowered(edit, _factor(strength, number)) for number, edit in enumerate(plan.edits)]
    with ExitStack() as hooks:
        handle: Any = parts.decoder.register_forward_pre_hook(window.read, with_kwargs=True)
        hooks.callback(handle.remove)
        for module, site, edits in _by_module(parts, lowered):
            steer = partial(_apply, edits=edits, window=window)
            if site is Site.BLOCK_INPUT:
                handle = module.register_forward_pre_hook(partial(_steer_input, steer), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(_steer_output, steer))
            hooks.callback(handle.remove)
        yield


def _factor(strength: torch.Tensor | None, number: int) -> torch.Tensor | None:
    """The factor of one edit per row, float32 (B, 1, 1)."""
    if strength is None:
        return None
    return (strength if strength.ndim == 1 else strength[:, number]).float()[:, None, None]


class _Window:
    """The attention mask of the forward pass under way, and which of its positions are selected.

    Prompt lengths are those given or, without any, the tokens of the latest pass without past.
    """

    def __init__(self, prompt_lengths: torch.Tensor | None) -> None:
        self._given_B = prompt_lengths
        self._latest_B: torch.Tensor | None = None
        self._mask_BT: torch.Tensor | None = None
        self._past = 0
        self._sequence: int | None = None
        self._selected: dict[Positions, torch.Tensor] = {}

    def read(self, _decoder: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = attended_tokens(kwargs.get("attention_mask"))
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise UnsupportedError(
                "steering needs the decoder's 2-D attention mask [batch, past + sequence] to find the last "
                f"position of each row; got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self._past = _past_length(kwargs.get("past_key_values"))
        read = kwargs.get("inputs_embeds")
        read = kwargs.get("input_ids") if read is None else read
        self._sequence = None if read is None else read.shape[1]
        self._mask_BT, self._selected = mask, {}

    def selected(self, positions: Positions, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """The positions of this pass that an edit acts at, bool (B, S).

        A block may be given fewer than the pass has: those at its end, where logits are asked for (Gemma 4).
        """
        batch, given = hidden_BSD.shape[:2]
        if positions not in self._selected:
            sequence = given if self._sequence is None else self._sequence
            mask_BT = self._mask_BT
            if mask_BT is None:
                total = self._past + sequence
                mask_BT = torch.ones(batch, total, dtype=torch.long, device=hidden_BSD.device)
            lengths = partial(self._prompt_lengths, mask_BT, sequence)
            self._selected[positions] = selected(positions, mask_BT, sequence, lengths)
        return self._selected[positions][:, -given:].to(hidden_BSD.device)

    def _prompt_lengths(self, mask_BT: torch.Tensor, sequence: int) -> torch.Tensor:
        if self._given_B is not None:
            return self._given_B.to(mask_BT.device)
        if mask_BT.shape[1] == sequence:
            self._latest_B = mask_BT.long().sum(dim=1)
        if self._latest_B is None or len(self._latest_B) != len(mask_BT):
            raise UnsupportedError(
                "this pass continues a cache whose prompt was not seen while steering; give prompt_lengths"
            )
        return self._latest_B


def _past_length(cache: Any) -> int:
    """How many positions a cache holds; code that comes with a checkpoint may keep keys and values in tuples."""
    if cache is None:
        return 0
    return int(cache[0][0].shape[-2] if isinstance(cache, (tuple, list)) else cache.get_seq_length())


class _Lowered:
    """One edit as tensors, moved to the stream's device once; `factor`: of its strength, float32 (B, 1, 1)."""

    def __init__(self, edit: Edit, factor: torch.Tensor | None) -> None:
        self.edit = edit
        self._factor_B11 = factor
        self._tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in edit.tensors().items()}

    def steer(self, hidden_BSD: torch.Tensor, selected_BS: torch.Tensor) -> torch.Tensor:
        """The stream, edited at the selected positions."""
        tensors = {name: tensor.to(hidden_BSD.device) for name, tensor in self._tensors.items()}
        strength = torch.tensor(self.edit.strength, dtype=torch.float32, device=hidden_BSD.device)
        if isinstance(self.edit, Add):
            change = strength * tensors["vector"]
        else:
            change = _projection(hidden_BSD, strength, tensors)
        chosen_BS1 = selected_BS[..., None]
        if self._factor_B11 is not None:
            factor_B11 = self._factor_B11.to(hidden_BSD.device)
            change, chosen_BS1 = factor_B11 * change, chosen_BS1 & (factor_B11 != 0)
        change = change.to(hidden_BSD.dtype)
        edited_BSD = hidden_BSD + change if isinstance(self.edit, Add) else hidden_BSD - change
        return torch.where(chosen_BS1, edited_BSD, hidden_BSD)


def _projection(
    hidden_BSD: torch.Tensor, strength: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    basis_DK = tensors["basis"]
    centred_BSD = hidden_BSD.float() - tensors["mean"] if "mean" in tensors else hidden_BSD.float()
    return (centred_BSD @ basis_DK) @ (strength * basis_DK).T


def _apply(hidden_BSD: torch.Tensor, *, edits: Sequence[_Lowered], window: _Window) -> torch.Tensor:
    for lowered in edits:
        hidden_BSD = lowered.steer(hidden_BSD, window.selected(lowered.edit.positions, hidden_BSD))
    return hidden_BSD


def _steer_output(steer: Steer, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
    hidden_BSD = steer(hidden_of(output))
    return (hidden_BSD, *output[1:]) if isinstance(output, tuple) else hidden_BSD


def _steer_input(
    steer: Steer, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (steer(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": steer(kwargs["hidden_states"])}


def _by_module(
    parts: DecoderParts, lowered: Sequence[_Lowered]
) -> Iterator[tuple[torch.nn.Module, Site, list[_Lowered]]]:
    """Each module to hook with the edits that act there, in the plan's order."""
    for site in Site:
        for layer, block in enumerate(parts.blocks):
            edits = [entry for entry in lowered if (entry.edit.site, entry.edit.layer) == (site, layer)]
            if edits:
                yield parts.final_norm if site is Site.FINAL_NORM_OUTPUT else block, site, edits
