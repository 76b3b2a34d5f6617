"""`patch`: a decoder graph and a plan in, the steered decoder graph out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from calibration.plan import check_plan_fits
from graph_passes.checks import check_count, check_interface, check_wiring
from graph_passes.insertion import InsertedEdit, insert_edits
from graph_passes.residual_stream import ResidualStream, find_residual_stream

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.plan import SteeringPlan

FINGERPRINT_KEY = "sarsteer.model_fingerprint"
"""Metadata entry in which an exported decoder names the checkpoint it came from."""
PLAN_KEY = "sarsteer.plan_sha256"
"""Metadata entry in which a steered decoder names its plan."""


class LastFrom(str, Enum):
    """Where a graph learns which position is the last of each row."""

    ATTENTION_MASK = "attention_mask"
    SEQUENCE = "sequence"


@dataclass(frozen=True)
class PatchResult:
    """The steered graph, the stream that was found and the edits as they stand in the graph."""

    model: ModelProto
    stream: ResidualStream
    edits: tuple[InsertedEdit, ...]


def patch_model(
    model: ModelProto,
    plan: SteeringPlan,
    *,
    force: bool = False,
    last_from: LastFrom = LastFrom.ATTENTION_MASK,
) -> PatchResult:
    """Insert `plan` into a decoder graph; `model` itself is left as it is.

    Requires a decoder graph in topological order whose residual stream can be found. Ensures the same
    interface, as many edits as the plan has, and that every edit is read. External data is only referred
    to. Raises `SiteNotFoundError` when there is no residual stream, `InputError` when the plan does not fit
    (or, unless `force`, was made for another model) or the graph is steered already.
    """
    stream = find_residual_stream(model)
    check_plan_fits(
        plan,
        hidden_size=stream.hidden_size,
        num_layers=len(stream.blocks),
        fingerprint=metadata(model).get(FINGERPRINT_KEY),
        force=force,
    )
    steered, edits = insert_edits(model, stream, plan, last_from_mask=last_from is LastFrom.ATTENTION_MASK)
    entry = steered.metadata_props.add()
    entry.key, entry.value = PLAN_KEY, plan.digest()
    check_interface(model, steered)
    check_wiring(steered, edits)
    check_count(plan, edits)
    return PatchResult(steered, stream, edits)


def metadata(model: ModelProto) -> dict[str, str]:
    """The model's metadata entries."""
    return {entry.key: entry.value for entry in model.metadata_props}
