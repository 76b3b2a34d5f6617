"""The eager steered model: a plan applied to a Hugging Face model by hooks. It is the oracle of parity.

Dimensions: B batch, S sequence of this forward pass, T past and present, D width.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from calibration.errors import UnsupportedError
from calibration.lalm import DecoderParts, find_decoder
from calibration.plan import Add, Edit, Positions, Site, SteeringPlan, check_plan_fits
from calibration.states import hidden_of, last_attended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Steer = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def steered(model: torch.nn.Module, plan: SteeringPlan) -> Iterator[None]:
    """Within the block, every forward pass of `model` is steered by `plan`; afterwards it is as before.

    Acts in prefill and in every decode step, `generate` included. Raises `InputError` when the plan is for
    a decoder of another width or depth.
    """
    parts = find_decoder(model)
    check_plan_fits(plan, hidden_size=parts.hidden_size, num_layers=len(parts.blocks))
    window = _Window()
    with ExitStack() as hooks:
        handle: Any = parts.decoder.register_forward_pre_hook(window.read, with_kwargs=True)
        hooks.callback(handle.remove)
        for module, site, edits in _by_module(parts, plan):
            steer = partial(_apply, edits=[_Lowered(edit) for edit in edits], window=window)
            if site is Site.BLOCK_INPUT:
                handle = module.register_forward_pre_hook(partial(_steer_input, steer), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(_steer_output, steer))
            hooks.callback(handle.remove)
        yield


class _Window:
    """The attention mask of the forward pass under way, and which of its positions are the last attended."""

    def __init__(self) -> None:
        self._mask_BT: torch.Tensor | None = None
        self._last_BS: torch.Tensor | None = None

    def read(self, _decoder: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise UnsupportedError(
                "steering needs the decoder's 2-D attention mask [batch, past + sequence] to find the last "
                f"position of each row; got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self._mask_BT, self._last_BS = mask, None

    def last(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        if self._last_BS is None:
            batch, sequence = hidden_BSD.shape[:2]
            mask_BT = self._mask_BT
            if mask_BT is None:
                mask_BT = torch.ones(batch, sequence, dtype=torch.long, device=hidden_BSD.device)
            self._last_BS = last_attended(mask_BT, sequence)
        return self._last_BS.to(hidden_BSD.device)


class _Lowered:
    """One edit as tensors, moved to the stream's device once."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in edit.tensors().items()}

    def steer(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """The edit at every position of the stream, whatever `positions` says."""
        tensors = {name: tensor.to(hidden_BSD.device) for name, tensor in self._tensors.items()}
        strength = torch.tensor(self.edit.strength, dtype=torch.float32, device=hidden_BSD.device)
        if isinstance(self.edit, Add):
            return hidden_BSD + (strength * tensors["vector"]).to(hidden_BSD.dtype)
        return hidden_BSD - _projection(hidden_BSD, strength, tensors).to(hidden_BSD.dtype)


def _projection(
    hidden_BSD: torch.Tensor, strength: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    basis_DK = tensors["basis"]
    centred_BSD = hidden_BSD.float() - tensors["mean"] if "mean" in tensors else hidden_BSD.float()
    return (centred_BSD @ basis_DK) @ (strength * basis_DK).T


def _apply(hidden_BSD: torch.Tensor, *, edits: Sequence[_Lowered], window: _Window) -> torch.Tensor:
    for lowered in edits:
        steered_BSD = lowered.steer(hidden_BSD)
        if lowered.edit.positions is Positions.LAST:
            steered_BSD = torch.where(window.last(hidden_BSD)[..., None], steered_BSD, hidden_BSD)
        hidden_BSD = steered_BSD
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


def _by_module(parts: DecoderParts, plan: SteeringPlan) -> Iterator[tuple[torch.nn.Module, Site, list[Edit]]]:
    """Each module to hook with the edits that act there, in the plan's order."""
    for site in Site:
        for layer, block in enumerate(parts.blocks):
            edits = [edit for edit in plan.edits if (edit.site, edit.layer) == (site, layer)]
            if edits:
                yield parts.final_norm if site is Site.FINAL_NORM_OUTPUT else block, site, edits
