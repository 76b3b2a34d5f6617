"""What the dimensions of a graph's inputs mean, whatever an exporter calls them.

Every dynamic dimension of an input has a role: `batch`, `sequence` (tokens of this pass), `past` (tokens in the
KV cache), `total` (past + sequence) or `clips`. It follows from the input's name and the axis, because exporters
give each layer's past a symbol of its own. A dimension of any other input has the role of the same symbol
elsewhere; failing that its symbol is its role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibration.errors import InputError
from engines.shape_grammar import shape_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engines.sidecar import Binding

BATCH, SEQUENCE, PAST, TOTAL, CLIPS = "batch", "sequence", "past", "total", "clips"


def fixed_dims(binding: Binding) -> Binding:
    """The same binding, with dimensions that an exporter wrote as numeric strings ("64") read as numbers."""
    return replace(binding, dims=tuple(_number(dim) for dim in binding.dims))


@dataclass(frozen=True)
class GraphInputs:
    """A graph's inputs and, per input and axis, the role of the dimension (None: fixed, without dynamic peers).

    `dynamic`: where each dynamic role is seen first, (input, axis). `fixed`: sizes of roles that are nowhere
    dynamic, such as the sequence of a graph that only decodes.
    """

    inputs: dict[str, Binding]
    roles: dict[str, tuple[str | None, ...]]
    dynamic: dict[str, tuple[str, int]]
    fixed: dict[str, int]

    @classmethod
    def of(cls, inputs: Sequence[Binding]) -> GraphInputs:
        """Find the roles of a graph's inputs."""
        bindings = {binding.name: fixed_dims(binding) for binding in inputs}
        by_symbol: dict[int | str, str] = {}
        fixed: dict[str, int] = {}
        for binding in bindings.values():
            for axis, role in _roles_by_name(binding.name, len(binding.dims)).items():
                dim = binding.dims[axis]
                if _is_fixed(dim):
                    fixed.setdefault(role, int(dim))
                else:
                    by_symbol.setdefault(dim, role)
        roles: dict[str, tuple[str | None, ...]] = {}
        dynamic: dict[str, tuple[str, int]] = {}
        for name, binding in bindings.items():
            named = _roles_by_name(name, len(binding.dims))
            roles[name] = tuple(
                None if _is_fixed(dim) else named.get(axis) or _role_by_symbol(name, axis, dim, by_symbol)
                for axis, dim in enumerate(binding.dims)
            )
            for axis, role_or_none in enumerate(roles[name]):
                if role_or_none is not None:
                    dynamic.setdefault(role_or_none, (name, axis))
        return cls(bindings, roles, dynamic, {role: n for role, n in fixed.items() if role not in dynamic})

    def is_dynamic(self, name: str) -> bool:
        """Whether an input has a dynamic dimension."""
        return any(role is not None for role in self.roles[name])


def _number(dim: int | str) -> int | str:
    return int(dim) if isinstance(dim, str) and re.fullmatch(r"-?[0-9]{1,18}", dim.strip()) else dim


def _is_fixed(dim: int | str) -> bool:
    return isinstance(dim, int) and dim >= 0


def _roles_by_name(name: str, rank: int) -> dict[int, str]:
    """The roles of axes that an input's name tells."""
    if name in ("inputs_embeds", "input_ids") and rank >= 2:
        return {0: BATCH, 1: SEQUENCE}
    if name == "position_ids" and rank in (2, 3):
        return {rank - 2: BATCH, rank - 1: SEQUENCE}
    if name == "attention_mask" and rank == 2:
        return {0: BATCH, 1: TOTAL}
    if name.startswith("past_") and rank == 4:
        return {0: BATCH, 2: PAST}
    if name in ("input_features", "feature_attention_mask") and rank >= 1:
        return {0: CLIPS}
    return {}


def _role_by_symbol(name: str, axis: int, dim: int | str, by_symbol: Mapping[int | str, str]) -> str:
    """The role of a dimension by its symbol; one without a symbol ("" or -1) is like no other."""
    if not isinstance(dim, str) or not dim.strip():
        return f"{name}[{axis}]"
    return by_symbol.get(dim, dim)


def bind(graph: GraphInputs, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, tuple[int, str]]:
    """The sizes that shapes of some inputs give to roles, each with the input that gave it.

    Raises `InputError`, which begins with `where`, for shapes that contradict the graph or each other.
    """
    bound: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        _check_shape(graph, name, shape, where)
        for size, role in zip(shape, graph.roles[name], strict=True):
            if role is None:
                continue
            first, teller = bound.setdefault(role, (size, name))
            if first != size:
                raise InputError(
                    f"{where}: the inputs disagree on {role}: {first} in {teller!r}, {size} in {name!r}; "
                    "expected the same number"
                )
    return bound


def _check_shape(graph: GraphInputs, name: str, shape: tuple[int, ...], where: str) -> None:
    if name not in graph.inputs:
        raise InputError(
            f"{where}: the graph has no input {name!r}; its inputs are {', '.join(graph.inputs)}"
        )
    binding = graph.inputs[name]
    if len(shape) != len(binding.dims):
        raise InputError(
            f"{where}: {name!r} is given {len(shape)} dimensions ({shape_text(shape)}); expected "
            f"{len(binding.dims)}: {binding}"
        )
    for axis, (size, dim) in enumerate(zip(shape, binding.dims, strict=True)):
        if size < 0:
            raise InputError(f"{where}: axis {axis} of {name!r} is {size}; expected 0 or more")
        if _is_fixed(dim) and size != dim:
            raise InputError(
                f"{where}: axis {axis} of {name!r} is {size}, but the graph fixes it at {dim}: {binding}"
            )
