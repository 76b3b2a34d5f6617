"""Whether the residual stream of a decoder, and its square in the norms, fits the element types of a graph.

Calibration stores in the plan how large the stream gets; the graph says in which types it is held and
squared. A value above √65504 ≈ 256 squares to infinity in float16, and the norm of its row to zero.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import TensorProto

from calibration.errors import InputError
from calibration.plan import check_plan_fits
from graph_passes.norm_precision import largest_finite, narrowest_type, norm_precisions, type_name
from graph_passes.residual_stream import find_residual_stream
from graph_passes.scopes import decoder_scopes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx import ModelProto

    from calibration.plan import SteeringPlan
    from graph_passes.residual_stream import ResidualStream

logger = logging.getLogger(__name__)

PROVENANCE_KEY = "largest_magnitude"
"""The entry of a plan's provenance in which calibration stores what it measured."""


@dataclass(frozen=True)
class StreamMagnitudes:
    """The largest |h| of the residual stream in every decoder block, without and with the plan's steering."""

    unsteered: tuple[float, ...]
    steered: tuple[float, ...]


@dataclass(frozen=True)
class _Use:
    """One use of the stream in one block: the largest magnitude that it can take, and what it does."""

    block: int
    limit: float
    what: str
    fails: bool


def check_range(
    plan: SteeringPlan,
    graph: ModelProto,
    *,
    stream: ResidualStream | None = None,
    allow_overflow: bool = False,
) -> list[str]:
    """Compare what calibration measured with what a decoder graph, steered or not, can hold.

    `stream`: the graph's residual stream, where it was found already; of a merged decoder, the first body's.

    Returns the warnings, which are also logged: overflow in types other than float16, in operators that
    leave their precision to the runtime, or, with `allow_overflow`, any; and that nothing was measured
    where float16 has to hold it. The mean of a row's squares is below the largest, so that a runtime which
    sums before it divides can overflow earlier. Raises `InputError` when float16 overflows, when the plan's
    measurements are malformed or when it is for another shape of decoder.
    """
    graph = decoder_scopes(graph)[0].view(graph)
    if stream is None:
        stream = find_residual_stream(graph)
    check_plan_fits(plan, hidden_size=stream.hidden_size, num_layers=len(stream.blocks))
    norms = norm_precisions(graph, stream)
    magnitudes = plan_magnitudes(plan)
    if magnitudes is None:
        return _unmeasured([stream.elem_type, *(norm.elem_type for norm in norms)])
    squares = []
    for norm in norms:
        largest = largest_finite(norm.elem_type)
        limit = math.sqrt(largest)
        leave = ", if the runtime does not widen it," if norm.runtime_decides else ""
        what = (
            f"{norm.node} squares it{leave} in {type_name(norm.elem_type)}, up to {largest:g} = {limit:.4g}²"
        )
        fails = norm.elem_type == TensorProto.FLOAT16 and not norm.runtime_decides
        squares.append(_Use(norm.block, limit, what, fails=fails))
    certain = [use for use in squares if use.fails]
    uncertain = [use for use in squares if not use.fails]
    return _judge(
        [_holds(stream.elem_type, magnitudes, "graph"), certain, uncertain], magnitudes, allow_overflow
    )


def check_stream_range(plan: SteeringPlan, elem_type: int, *, allow_overflow: bool = False) -> list[str]:
    """Compare what calibration measured with what an engine can hold, whose stream is of an ONNX element type.

    What an engine squares in which type cannot be seen any more. Returns and raises as `check_range` does.
    """
    magnitudes = plan_magnitudes(plan)
    if magnitudes is None:
        return _unmeasured([elem_type])
    return _judge([_holds(elem_type, magnitudes, "engine")], magnitudes, allow_overflow)


def _holds(elem_type: int, magnitudes: StreamMagnitudes, what: str) -> list[_Use]:
    """That the stream is held in every block."""
    limit = largest_finite(elem_type)
    told = f"the {what} holds it in {type_name(elem_type)}, up to {limit:g}"
    fails = elem_type == TensorProto.FLOAT16
    return [_Use(block, limit, told, fails=fails) for block in range(len(magnitudes.unsteered))]


def _judge(kinds: Iterable[Iterable[_Use]], magnitudes: StreamMagnitudes, allow_overflow: bool) -> list[str]:
    """The worst of every kind of use, as a warning or, where it fails and is not allowed, as an error."""
    warnings: list[str] = []
    for uses in kinds:
        found = _overflow(uses, magnitudes)
        if found is None:
            continue
        use, message = found
        if use.fails and not allow_overflow:
            raise InputError(f"{message}, or go on with --allow-overflow")
        warnings.append(message)
    return _warn(warnings)


def _unmeasured(elem_types: list[int]) -> list[str]:
    """What there is to say of a plan that was not measured, for a stream that is held and squared in these types."""
    if narrowest_type(elem_types) != TensorProto.FLOAT16:
        return []
    return _warn(
        [
            f"the plan says nothing of the residual stream's largest magnitude ({PROVENANCE_KEY!r} in its "
            "provenance, written by calibration); whether float16 holds its square was not checked"
        ]
    )


def plan_magnitudes(plan: SteeringPlan) -> StreamMagnitudes | None:
    """What calibration stored in a plan's provenance; None for a plan that holds no such entry.

    Raises `InputError` naming the entry that is malformed.
    """
    entry = plan.provenance.get(PROVENANCE_KEY)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise InputError(f"provenance.{PROVENANCE_KEY} is {type(entry).__name__}; expected an object")
    return StreamMagnitudes(*(_per_block(entry, kind, plan.num_layers) for kind in ("unsteered", "steered")))


def _per_block(entry: dict[str, object], kind: str, num_layers: int) -> tuple[float, ...]:
    where, values = f"provenance.{PROVENANCE_KEY}.{kind}", entry.get(kind)
    if not isinstance(values, (list, tuple)) or len(values) != num_layers:
        raise InputError(f"{where} is {values!r:.80}; expected {num_layers} numbers, one per block")
    for value in values:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value <= sys.float_info.max
        ):
            raise InputError(f"{where} holds {value!r}; expected finite numbers, at least 0")
    return tuple(float(value) for value in values)


def _overflow(uses: Iterable[_Use], magnitudes: StreamMagnitudes) -> tuple[_Use, str] | None:
    """The use whose limit is passed the furthest and what to say of it, the model's own overflow first."""
    uses = list(uses)
    own = [use for use in uses if magnitudes.unsteered[use.block] > use.limit]
    passed = own or [use for use in uses if magnitudes.steered[use.block] > use.limit]
    if not passed:
        return None
    by_run = magnitudes.unsteered if own else magnitudes.steered
    worst = max(passed, key=lambda use: by_run[use.block] / use.limit)
    cause = "the model overflows by itself" if own else "steering makes it overflow"
    remedy = "export with --dtype bfloat16 or float32" + ("" if own else ", calibrate with a smaller --alpha")
    return worst, (
        f"the residual stream reaches {magnitudes.unsteered[worst.block]:g} unsteered and "
        f"{magnitudes.steered[worst.block]:g} steered in block {worst.block}; {worst.what}: {cause}; {remedy}"
    )


def _warn(messages: list[str]) -> list[str]:
    for message in messages:
        logger.warning("%s", message)
    return messages
