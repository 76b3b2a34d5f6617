"""Optimization profiles: the ranges of shapes that a TensorRT engine is built for and may be fed with.

Every dynamic dimension of an input has a role: `batch`, `sequence` (tokens of this pass), `past` (tokens in the
KV cache), `total` (past + sequence) or `clips`. It follows from the input's name and the axis, because exporters
give each layer's past a symbol of its own. A dimension of any other input has the role of the same symbol
elsewhere; failing that its symbol is its role, which has a default range only when it is one of these words.

A profile is made per role, so that all inputs agree. TensorRT refuses a profile whose optimal shapes contradict
each other, and only warns when the smallest or largest do: largest past and largest sequence need not be
reachable together, and the largest total bounds them both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from calibration.errors import InputError
from engines.sidecar import Binding, Profile, ShapeRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BATCH, SEQUENCE, PAST, TOTAL, CLIPS = "batch", "sequence", "past", "total", "clips"
TUNED_PROMPT = 256
"""The sequence length that prefill is tuned for, where the longest prompt allows it."""

_KINDS = ("min", "opt", "max")
_SHAPE_OPTIONS = "--min-shapes, --opt-shapes and --max-shapes"
_COPIED_FROM = {
    "min": ("--min-shapes", "--opt-shapes", "--max-shapes"),
    "opt": ("--opt-shapes", "--max-shapes", "--min-shapes"),
    "max": ("--max-shapes", "--opt-shapes", "--min-shapes"),
}
_LARGEST_DIMENSION = 2**31 - 1
_SHAPE = re.compile(
    r"(?:'(?P<quoted>[^']+)'|(?P<plain>[^']+)):(?P<dims>[0-9]{1,10}(?:x[0-9]{1,10})*|scalar|)"
)
_Range = tuple[int, int, int]
_Given = tuple["dict[str, int]", "dict[str, int]", "dict[str, int]"]


@dataclass(frozen=True)
class ProfileLimits:
    """How far derived profiles reach: rows, tokens of one pass, tokens of past and pass together.

    Raises `InputError` for a limit below 1 and for a prompt longer than the total.
    """

    max_batch: int = 4
    max_prompt: int = 1024
    max_total: int = 2048

    def __post_init__(self) -> None:
        for option, value in (
            ("--max-batch", self.max_batch),
            ("--max-prompt", self.max_prompt),
            ("--max-total", self.max_total),
        ):
            if value < 1:
                raise InputError(f"{option} is {value}; expected 1 or more")
        if self.max_prompt > self.max_total:
            raise InputError(
                f"--max-prompt {self.max_prompt} is more than --max-total {self.max_total}: a prompt must fit "
                "into the total; lower the one or raise the other"
            )


def fixed_dims(binding: Binding) -> Binding:
    """The same binding, with dimensions that an exporter wrote as numeric strings ("64") read as numbers."""
    return replace(binding, dims=tuple(_number(dim) for dim in binding.dims))


def derive_profiles(inputs: Sequence[Binding], limits: ProfileLimits) -> tuple[Profile, ...]:
    """The profiles that a graph's inputs suggest.

    A decoder with a KV cache gets `prefill` (any sequence, any past: chunked prefill is in range) and `decode`
    (sequence 1, tuned for half the longest past); one whose sequence is fixed gets the one of them that it can
    serve. Another graph with dynamic dimensions gets `default`; one without has no profile.
    Raises `InputError` for a dynamic dimension that has no default range.
    """
    graph = _Graph.of(inputs)
    if not graph.dynamic:
        return ()
    nothing: _Given = ({}, {}, {})
    one_token: _Given = (
        {SEQUENCE: 1},
        {SEQUENCE: 1, PAST: min(limits.max_total // 2, limits.max_total - 1)},
        {SEQUENCE: 1},
    )
    wanted = {"prefill": nothing, "decode": one_token}
    if PAST not in graph.dynamic:
        wanted = {"default": nothing}
    elif SEQUENCE in graph.fixed:
        del wanted["prefill" if graph.fixed[SEQUENCE] == 1 else "decode"]
    profiles = tuple(_make_profile(graph, name, given, limits) for name, given in wanted.items())
    check_profiles(inputs, profiles)
    return profiles


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """Read shapes by input name from trtexec's grammar, such as `inputs_embeds:1x1x64,attention_mask:1x1`.

    The last colon parts name and shape, a name may stand in single quotes, 0 is a length, `name:scalar` and
    `name:` are shapes without dimensions. Raises `InputError`, which names the option and the piece, for a
    piece of another form and for an input named twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in text.split(","):
        match = _SHAPE.fullmatch(piece.strip())
        dims = match["dims"] if match else ""
        shape = tuple(int(dim) for dim in dims.split("x")) if dims not in ("", "scalar") else ()
        if match is None or any(dim > _LARGEST_DIMENSION for dim in shape):
            raise InputError(
                f"{option}: {piece!r} is not a shape; expected INPUT:AxBxC, such as attention_mask:1x16, with "
                f"numbers from 0 to {_LARGEST_DIMENSION}, and commas between inputs"
            )
        name = match["quoted"] or match["plain"]
        if name in shapes:
            raise InputError(
                f"{option}: {name!r} is named twice in {text!r}; repeat the option for another profile"
            )
        shapes[name] = shape
    return shapes


def explicit_profiles(
    inputs: Sequence[Binding],
    min_shapes: Sequence[str],
    opt_shapes: Sequence[str],
    max_shapes: Sequence[str],
    names: Sequence[str],
    limits: ProfileLimits,
) -> tuple[Profile, ...]:
    """The profiles that shapes on the command line ask for, in trtexec's grammar; the n-th of each make profile n.

    A kind of shapes (min, opt, max) that is not given at all is copied from another as trtexec does: min from
    opt, else max; opt from max, else min; max from opt, else min. Within a profile the shapes given bind roles;
    inputs not given follow from them. Roles left open have the range they have in derived `prefill` (past and
    sequence also yield to a total that is given). Without `names` they are `profile-0`, `profile-1` and so on.
    Raises `InputError` for shapes, counts or names that contradict each other, the graph, or themselves.
    """
    given = {"--min-shapes": min_shapes, "--opt-shapes": opt_shapes, "--max-shapes": max_shapes}
    counts = {option: len(texts) for option, texts in given.items() if texts}
    if not counts:
        raise InputError(f"a profile needs shapes: give one or more of {_SHAPE_OPTIONS} for each --profile")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{option} {count}" for option, count in counts.items())
        raise InputError(
            f"shapes are given a different number of times: {told}; expected one of each per profile"
        )
    profile_names = _profile_names(names, max(counts.values()))
    graph = _Graph.of(inputs)
    if not graph.dynamic:
        raise InputError(
            f"shapes are given by {', '.join(counts)}, but every dimension of the graph is fixed: "
            f"{'; '.join(map(str, graph.inputs.values()))}; leave the shapes out"
        )
    profiles = []
    for number, name in enumerate(profile_names):
        bound = []
        for kind, options in _COPIED_FROM.items():
            option = next(option for option in options if option in counts)
            shapes = parse_shapes(given[option][number], option)
            roles = _bind(graph, shapes, f"profile {name!r}, {kind} shapes")
            bound.append({role: size for role, (size, _) in roles.items()})
        profiles.append(_make_profile(graph, name, (bound[0], bound[1], bound[2]), limits))
    check_profiles(inputs, profiles)
    return tuple(profiles)


def check_profiles(inputs: Sequence[Binding], profiles: Sequence[Profile]) -> None:
    """Raise `InputError` unless every profile suits the graph and itself.

    Inputs are known and of the graph's rank; fixed dimensions are the graph's; min <= opt <= max; every dynamic
    input is covered; inputs agree in every role; min and opt totals are past + sequence, and the max total lies
    between what either needs with the other smallest, and their sum.
    """
    graph = _Graph.of(inputs)
    if graph.dynamic and not profiles:
        raise InputError(f"the graph has dynamic dimensions ({', '.join(graph.dynamic)}) and no profile")
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise InputError(f"two profiles have the same name: {', '.join(names)}")
    for profile in profiles:
        _check_profile(graph, profile)


def fits(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a profile admits these shapes; inputs that it does not know have no dynamic dimension."""
    return next(_misfits(profile, shapes), None) is None


def tightest(profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The index of the profile that admits these shapes with the fewest elements at most; the first on a tie.

    Without profiles it is 0, the profile that TensorRT gives every engine of fixed shapes.
    Raises `InputError`, which names the input, axis, value and ranges, when no profile admits them.
    """
    if not profiles:
        return 0
    fitting = [index for index, profile in enumerate(profiles) if fits(profile, shapes)]
    if not fitting:
        raise InputError(_why_none_fits(profiles, shapes))
    return min(fitting, key=lambda index: sum(prod(s.max) for s in profiles[index].shapes.values()))


@dataclass(frozen=True)
class _Graph:
    """A graph's inputs and, per input and axis, the role of the dimension (None: fixed, without dynamic peers).

    `dynamic`: where each dynamic role is seen first, (input, axis). `fixed`: sizes of roles that are nowhere
    dynamic, such as the sequence of a graph that only decodes.
    """

    inputs: dict[str, Binding]
    roles: dict[str, tuple[str | None, ...]]
    dynamic: dict[str, tuple[str, int]]
    fixed: dict[str, int]

    @classmethod
    def of(cls, inputs: Sequence[Binding]) -> _Graph:
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


def _default_ranges(limits: ProfileLimits) -> dict[str, _Range]:
    rows = (1, 1, limits.max_batch)
    sequence = (1, min(TUNED_PROMPT, limits.max_prompt), limits.max_prompt)
    return {BATCH: rows, CLIPS: rows, SEQUENCE: sequence}


def _make_profile(graph: _Graph, name: str, given: _Given, limits: ProfileLimits) -> Profile:
    """The profile in which the given sizes of roles (min, opt, max) hold and the others are derived."""
    ranges = _complete_ranges(graph, f"profile {name!r}", given, limits)
    shapes = {}
    for binding in graph.inputs.values():
        if graph.is_dynamic(binding.name):
            rows = [
                tuple(
                    int(dim) if role is None else ranges[role][kind]
                    for dim, role in zip(binding.dims, graph.roles[binding.name], strict=True)
                )
                for kind in range(3)
            ]
            shapes[binding.name] = ShapeRange(*rows)
    return Profile(name, shapes)


def _complete_ranges(graph: _Graph, where: str, given: _Given, limits: ProfileLimits) -> dict[str, _Range]:
    """The range of every dynamic role, and of `sequence` and `past`, which `total` needs."""
    defaults = _default_ranges(limits)
    ranges = {}
    for role, (name, axis) in graph.dynamic.items():
        if role in (SEQUENCE, PAST, TOTAL):
            continue
        sizes = [kind.get(role) for kind in given]
        if role not in defaults and None in sizes:
            missing = ", ".join(kind for kind, size in zip(_KINDS, sizes, strict=True) if size is None)
            raise InputError(
                f"{where}: axis {axis} of input {name!r} is dynamic ({graph.inputs[name].dims[axis]!r}) and has "
                f"no default range; {missing} not given; give its shapes by {_SHAPE_OPTIONS}"
            )
        ranges[role] = _complete(sizes, defaults.get(role, (0, 0, 0)))
    ranges[SEQUENCE] = _sequence_range(graph, given, defaults[SEQUENCE])
    ranges[PAST] = _past_range(graph, given, ranges[SEQUENCE], limits)
    ranges[TOTAL] = _total_range(graph, given, ranges[SEQUENCE], ranges[PAST], limits)
    return ranges


def _sequence_range(graph: _Graph, given: _Given, default: _Range) -> _Range:
    """Where it is not given: what a given total leaves beside the past that is given, or none; else the default."""
    if SEQUENCE in graph.fixed:
        return _constant(graph.fixed[SEQUENCE])
    shortest, tuned = (
        max(kind[TOTAL] - kind.get(PAST, 0), 0) if TOTAL in kind else length
        for kind, length in zip(given[:2], default[:2], strict=True)
    )
    longest = default[2]
    if TOTAL in given[2]:
        total = given[2][TOTAL]
        needed = total - given[2].get(PAST, total)
        longest = max(min(longest, total - given[0].get(PAST, 0)), needed)
    return _complete([kind.get(SEQUENCE) for kind in given], (shortest, tuned, longest))


def _past_range(graph: _Graph, given: _Given, sequence: _Range, limits: ProfileLimits) -> _Range:
    """Where it is not given: what a given total leaves beside the sequence; else from 0 as far as limits allow."""
    if PAST not in graph.dynamic:
        return _constant(graph.fixed.get(PAST, 0))
    least, tuned = (
        max(kind[TOTAL] - length, 0) if TOTAL in kind else 0
        for kind, length in zip(given[:2], sequence[:2], strict=True)
    )
    most = max(given[2].get(TOTAL, limits.max_total) - sequence[0], 0)
    return _complete([kind.get(PAST) for kind in given], (least, tuned, most))


def _total_range(
    graph: _Graph, given: _Given, sequence: _Range, past: _Range, limits: ProfileLimits
) -> _Range:
    """Where it is not given: the sum; at most `max_total` unless largest past and sequence are both given."""
    least, tuned, most = (p + s for p, s in zip(past, sequence, strict=True))
    if any(role in graph.dynamic and role not in given[2] for role in (SEQUENCE, PAST)):
        most = max(min(most, limits.max_total), past[2] + sequence[0], past[0] + sequence[2], tuned)
    return _fill([kind.get(TOTAL) for kind in given], (least, tuned, most))


def _constant(size: int) -> _Range:
    return size, size, size


def _fill(sizes: Sequence[int | None], default: _Range) -> _Range:
    low, tuned, high = (d if size is None else size for size, d in zip(sizes, default, strict=True))
    return low, tuned, high


def _complete(sizes: Sequence[int | None], default: _Range) -> _Range:
    """The sizes given; where one is not, the default, moved as far as the given ones demand."""
    known = [size for size in sizes if size is not None]
    low, tuned, high = _fill(sizes, (default[0], default[1], max([default[2], default[0], *known])))
    return low, tuned if sizes[1] is not None else max(low, min(tuned, high)), high


def _profile_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    if not names:
        return tuple(f"profile-{number}" for number in range(count))
    if len(names) != count:
        raise InputError(
            f"--profile names {len(names)} profiles ({', '.join(names)}), but shapes are given for {count}; "
            f"give {_SHAPE_OPTIONS} once for each name, in the same order"
        )
    return tuple(names)


def _bind(graph: _Graph, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, tuple[int, str]]:
    """The sizes that shapes of some inputs give to roles, each with the input that gave it."""
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


def _check_shape(graph: _Graph, name: str, shape: tuple[int, ...], where: str) -> None:
    if name not in graph.inputs:
        raise InputError(
            f"{where}: the graph has no input {name!r}; its inputs are {', '.join(graph.inputs)}"
        )
    binding = graph.inputs[name]
    if len(shape) != len(binding.dims):
        raise InputError(
            f"{where}: {name!r} is given {len(shape)} dimensions ({_text(shape)}); expected "
            f"{len(binding.dims)}: {binding}"
        )
    for axis, (size, dim) in enumerate(zip(shape, binding.dims, strict=True)):
        if size < 0:
            raise InputError(f"{where}: axis {axis} of {name!r} is {size}; expected 0 or more")
        if _is_fixed(dim) and size != dim:
            raise InputError(
                f"{where}: axis {axis} of {name!r} is {size}, but the graph fixes it at {dim}: {binding}"
            )


def _check_profile(graph: _Graph, profile: Profile) -> None:
    where = f"profile {profile.name!r}"
    bound = [
        _bind(
            graph, {name: getattr(s, kind) for name, s in profile.shapes.items()}, f"{where}, {kind} shapes"
        )
        for kind in _KINDS
    ]
    for name, shape in profile.shapes.items():
        for axis, sizes in enumerate(zip(shape.min, shape.opt, shape.max, strict=True)):
            if list(sizes) != sorted(sizes):
                raise InputError(
                    f"{where}: axis {axis} of {name!r} has min {sizes[0]}, opt {sizes[1]}, max {sizes[2]}; "
                    "expected min <= opt <= max"
                )
    for name, binding in graph.inputs.items():
        if graph.is_dynamic(name) and name not in profile.shapes:
            raise InputError(f"{where}: no shapes for the dynamic input {binding}")
    if TOTAL in graph.dynamic:
        _check_total(graph, where, bound)


def _check_total(graph: _Graph, where: str, bound: Sequence[dict[str, tuple[int, str]]]) -> None:
    """Check total against past + sequence, in min, opt and max."""
    if SEQUENCE not in graph.dynamic and SEQUENCE not in graph.fixed:
        return
    sequence = [kind[SEQUENCE][0] if SEQUENCE in kind else graph.fixed[SEQUENCE] for kind in bound]
    past = [kind[PAST][0] if PAST in kind else graph.fixed.get(PAST, 0) for kind in bound]
    input_name = graph.dynamic[TOTAL][0]
    for number, kind in enumerate(_KINDS):
        length, total = sequence[number], bound[number][TOTAL][0]
        least = most = past[number] + length
        if kind == "max":
            least = max(past[2] + sequence[0], past[0] + length)
        if not least <= total <= most:
            expected = f"{most}" if least == most else f"{least} to {most}"
            raise InputError(
                f"{where}, {kind} shapes: the total of {input_name!r} is {total}, but past {past[number]} and "
                f"sequence {length} make {most}; expected {expected}"
            )


def _misfits(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """Input and axis of each dimension that leaves a profile; axis -1 for an input of another rank or none."""
    for name, allowed in profile.shapes.items():
        shape = shapes.get(name)
        if shape is None or len(shape) != len(allowed.max):
            yield name, -1
            continue
        for axis, (size, low, high) in enumerate(zip(shape, allowed.min, allowed.max, strict=True)):
            if not low <= size <= high:
                yield name, axis


def _why_none_fits(profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, ...]]) -> str:
    misfits = [list(_misfits(profile, shapes)) for profile in profiles]
    common = next((where for where in misfits[0] if all(where in others for others in misfits[1:])), None)
    reasons = misfits if common is None else [[common]] * len(profiles)
    told = []
    for profile, ((name, axis), *_) in zip(profiles, reasons, strict=True):
        allowed = profile.shapes[name]
        if axis < 0:
            found = _text(shapes[name]) if name in shapes else "missing"
            told.append(f"{name!r} is {found}, {profile.name!r} admits {allowed}")
        else:
            told.append(
                f"axis {axis} of {name!r} is {shapes[name][axis]}, {profile.name!r} admits "
                f"{allowed.min[axis]}..{allowed.max[axis]}"
            )
    return (
        f"no profile of the engine admits these shapes: {'; '.join(told)}; feed shapes within one profile, or "
        f"build the engine with wider ones (--max-batch, --max-prompt, --max-total, or {_SHAPE_OPTIONS})"
    )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
