"""`patch`: a decoder graph and a plan in, the steered decoder graph out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.plan import check_plan_fits
from graph_passes.checks import check_count, check_interface, check_wiring
from graph_passes.insertion import InsertedEdit, insert_edits
from graph_passes.named_sites import check_flat
from graph_passes.plan_names import CONSTANTS_KEY, FINGERPRINT_KEY, PLAN_KEY, metadata, name_plan
from graph_passes.residual_stream import ResidualStream, find_residual_streams
from graph_passes.scopes import Scope
from graph_passes.selection import SteeringInputs

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.plan import SteeringPlan


@dataclass(frozen=True)
class PatchResult:
    """The steered graph, the stream that was found (of a merged decoder's first body), the plan and the edits made."""

    model: ModelProto
    stream: ResidualStream
    plan: SteeringPlan
    edits: tuple[InsertedEdit, ...]


def patch_model(
    model: ModelProto,
    plan: SteeringPlan,
    *,
    force: bool = False,
    inputs: SteeringInputs = SteeringInputs(),  # noqa: B008 - frozen
    stream: ResidualStream | None = None,
) -> PatchResult:
    """Insert `plan` into a decoder graph; `model` itself is left as it is.

    Requires a decoder graph in topological order whose residual stream can be found, or is given as `stream`,
    checked by `check_sites`. Ensures the same interface but for the inputs that `inputs` asks for, as many edits
    as the plan has, and that every edit is read. External data is only referred to. Raises `SiteNotFoundError`
    when there is no residual stream, `InputError` when the plan does not fit (or, unless `force`, was made for
    another model) or the graph is steered already, `UnsupportedError` when the graph cannot tell the positions
    that the plan names, or is a merged decoder and `stream` is given.
    """
    said = metadata(model)
    if PLAN_KEY in said or CONSTANTS_KEY in said:
        raise InputError(
            f"the graph says that it is steered already, by plan {said.get(PLAN_KEY, '?')[:12]}; patch the unsteered "
            "graph instead, or use --replace"
        )
    if stream is not None:
        check_flat(model)
    streams = find_residual_streams(model) if stream is None else {Scope(): stream}
    stream = next(iter(streams.values()))
    check_plan_fits(
        plan,
        hidden_size=stream.hidden_size,
        num_layers=len(stream.blocks),
        fingerprint=metadata(model).get(FINGERPRINT_KEY),
        force=force,
    )
    steered, edits = insert_edits(model, streams, plan, inputs)
    name_plan(steered, plan.digest())
    check_interface(model, steered)
    check_wiring(steered, edits)
    check_count(plan, edits, tuple(streams))
    return PatchResult(steered, stream, plan, edits)
