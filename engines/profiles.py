"""Optimization profiles: the ranges of shapes that a TensorRT engine is built for and may be fed with.

A profile is made per role of a dimension (`engines.input_roles`), so that all inputs agree; a role of another name
than those has no default range. TensorRT refuses a profile whose optimal shapes contradict
each other, and only warns when the smallest or largest do: largest past and largest sequence need not be
reachable together, and the largest total bounds them both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from calibration.errors import InputError
from engines.input_roles import BATCH, CLIPS, PAST, SEQUENCE, TOTAL, GraphInputs, bind
from engines.shape_grammar import LARGEST_DIMENSION, parse_shapes, shape_text
from engines.sidecar import Profile, ShapeRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from engines.sidecar import Binding

TUNED_PROMPT = 256
"""The sequence length that prefill is tuned for, where the longest prompt allows it."""

_KINDS = ("min", "opt", "max")
_SHAPE_OPTIONS = "--min-shapes, --opt-shapes and --max-shapes"
_COPIED_FROM = {
    "min": ("--min-shapes", "--opt-shapes", "--max-shapes"),
    "opt": ("--opt-shapes", "--max-shapes", "--min-shapes"),
    "max": ("--max-shapes", "--opt-shapes", "--min-shapes"),
}
_Range = tuple[int, int, int]
_Given = tuple["dict[str, int]", "dict[str, int]", "dict[str, int]"]


@dataclass(frozen=True)
class ProfileLimits:
    """How far derived profiles reach: rows, tokens of one pass, tokens of past and pass together.

    Raises `InputError` for a limit below 1 or beyond what TensorRT takes, and for a prompt longer than the total.
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
            if not 1 <= value <= LARGEST_DIMENSION:
                raise InputError(f"{option} is {value}; expected 1 to {LARGEST_DIMENSION}")
        if self.max_prompt > self.max_total:
            raise InputError(
                f"--max-prompt {self.max_prompt} is more than --max-total {self.max_total}: a prompt must fit "
                "into the total; lower the one or raise the other"
            )


def derive_profiles(inputs: Sequence[Binding], limits: ProfileLimits) -> tuple[Profile, ...]:
    """The profiles that a graph's inputs suggest.

    A decoder with a KV cache gets `prefill` (any sequence, any past: chunked prefill is in range) and `decode`
    (sequence 1, tuned for half the longest past); one whose sequence is fixed gets the one of them that it can
    serve. Another graph with dynamic dimensions gets `default`; one without has no profile.
    Raises `InputError` for a dynamic dimension that has no default range.
    """
    graph = GraphInputs.of(inputs)
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
    graph = GraphInputs.of(inputs)
    if not graph.dynamic:
        raise InputError(
            f"shapes are given by {', '.join(counts)}, but every dimension of the graph is fixed: "
            f"{'; '.join(map(str, graph.inputs.values()))}; leave the shapes out"
        )
    profiles = []
    for number, name in enumerate(profile_names):
        bound = []
        for options in _COPIED_FROM.values():
            option = next(option for option in options if option in counts)
            shapes = parse_shapes(given[option][number], option)
            where = f"profile {name!r}, {option.removeprefix('--').replace('-', ' ')}"
            roles = bind(graph, shapes, where)
            _check_not_empty(roles, where)
            bound.append({role: size for role, (size, _) in roles.items()})
        profiles.append(_make_profile(graph, name, (bound[0], bound[1], bound[2]), limits))
    check_profiles(inputs, profiles)
    return tuple(profiles)


def _check_not_empty(roles: Mapping[str, tuple[int, str]], where: str) -> None:
    """Refuse shapes by which a pass would have no row or no token; a past of length 0 is a prefill's."""
    for role in (BATCH, SEQUENCE, CLIPS):
        size, name = roles.get(role, (1, ""))
        if size == 0:
            raise InputError(f"{where}: {role} is 0 in {name!r}; expected 1 or more")


def check_profiles(inputs: Sequence[Binding], profiles: Sequence[Profile]) -> None:
    """Raise `InputError` unless every profile suits the graph and itself.

    Inputs are known and of the graph's rank; fixed dimensions are the graph's; min <= opt <= max, none larger than
    TensorRT takes; every dynamic input is covered; inputs agree in every role; min and opt totals are past + sequence,
    and the max total lies between what either needs with the other smallest, and their sum.
    """
    graph = GraphInputs.of(inputs)
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


def _default_ranges(limits: ProfileLimits) -> dict[str, _Range]:
    rows = (1, 1, limits.max_batch)
    sequence = (1, min(TUNED_PROMPT, limits.max_prompt), limits.max_prompt)
    return {BATCH: rows, CLIPS: rows, SEQUENCE: sequence}


def _make_profile(graph: GraphInputs, name: str, given: _Given, limits: ProfileLimits) -> Profile:
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


def _complete_ranges(
    graph: GraphInputs, where: str, given: _Given, limits: ProfileLimits
) -> dict[str, _Range]:
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


def _sequence_range(graph: GraphInputs, given: _Given, default: _Range) -> _Range:
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


def _past_range(graph: GraphInputs, given: _Given, sequence: _Range, limits: ProfileLimits) -> _Range:
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
    graph: GraphInputs, given: _Given, sequence: _Range, past: _Range, limits: ProfileLimits
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


def _check_profile(graph: GraphInputs, profile: Profile) -> None:
    where = f"profile {profile.name!r}"
    bound = [
        bind(graph, {name: getattr(s, kind) for name, s in profile.shapes.items()}, f"{where}, {kind} shapes")
        for kind in _KINDS
    ]
    for name, shape in profile.shapes.items():
        for axis, sizes in enumerate(zip(shape.min, shape.opt, shape.max, strict=True)):
            if list(sizes) != sorted(sizes):
                raise InputError(
                    f"{where}: axis {axis} of {name!r} has min {sizes[0]}, opt {sizes[1]}, max {sizes[2]}; "
                    "expected min <= opt <= max"
                )
            if sizes[2] > LARGEST_DIMENSION:
                raise InputError(
                    f"{where}: axis {axis} of {name!r} is up to {sizes[2]}; expected at most {LARGEST_DIMENSION}; "
                    "give smaller shapes (a total is past and sequence together)"
                )
    for name, binding in graph.inputs.items():
        if graph.is_dynamic(name) and name not in profile.shapes:
            raise InputError(f"{where}: no shapes for the dynamic input {binding}")
    if TOTAL in graph.dynamic:
        _check_total(graph, where, bound)


def _check_total(graph: GraphInputs, where: str, bound: Sequence[dict[str, tuple[int, str]]]) -> None:
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
            found = shape_text(shapes[name]) if name in shapes else "missing"
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
