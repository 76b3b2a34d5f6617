"""`patch`: a decoder graph and a plan in, the steered decoder graph out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.plan import check_plan_fits
from graph_passes.checks import check_count, check_interface, check_wiring
from graph_passes.insertion import InsertedEdit, insert_edits
from graph_passes.residual_stream import ResidualStream, find_residual_stream
from graph_passes.steering_in import constants_digest

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration.plan import SteeringPlan

FINGERPRINT_KEY = "sarsteer.model_fingerprint"
"""Metadata entry in which an exported decoder names the checkpoint it came from."""
PLAN_KEY = "sarsteer.plan_sha256"
"""Metadata entry in which a steered decoder names its plan."""
CONSTANTS_KEY = "sarsteer.constants_sha256"
"""Metadata entry by which a steered decoder's constants can be found complete and unaltered."""


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
    stream: ResidualStream | None = None,
) -> PatchResult:
    """Insert `plan` into a decoder graph; `model` itself is left as it is.

    Requires a decoder graph in topological order whose residual stream can be found, or is given as `stream`,
    checked by `check_sites`. Ensures the same
    interface, as many edits as the plan has, and that every edit is read. External data is only referred
    to. Raises `SiteNotFoundError` when there is no residual stream, `InputError` when the plan does not fit
    (or, unless `force`, was made for another model) or the graph is steered already.
    """
    stream = find_residual_stream(model) if stream is None else stream
    check_plan_fits(
        plan,
        hidden_size=stream.hidden_size,
        num_layers=len(stream.blocks),
        fingerprint=metadata(model).get(FINGERPRINT_KEY),
        force=force,
    )
    steered, edits = insert_edits(model, stream, plan, last_from_mask=last_from is LastFrom.ATTENTION_MASK)
    name_plan(steered, plan.digest())
    check_interface(model, steered)
    check_wiring(steered, edits)
    check_count(plan, edits)
    return PatchResult(steered, stream, edits)


def name_plan(model: ModelProto, plan_sha256: str) -> None:
    """Write into a steered graph's metadata which plan it holds, and the digest of its steering constants."""
    present = {entry.key: entry for entry in model.metadata_props}
    for key, value in ((PLAN_KEY, plan_sha256), (CONSTANTS_KEY, constants_digest(model))):
        entry = present.get(key) or model.metadata_props.add()
        entry.key, entry.value = key, value


def check_steering_whole(model: ModelProto) -> None:
    """Raise `InputError` when a graph that names a plan does not hold exactly the constants it was patched with."""
    named = metadata(model)
    if PLAN_KEY in named and named.get(CONSTANTS_KEY) != constants_digest(model):
        raise InputError(
            f"the graph says that it is steered by plan {named[PLAN_KEY][:12]}, and its steering constants are not "
            "those that were patched in: some are missing, renamed or altered since; patch the unsteered graph again"
        )


def metadata(model: ModelProto) -> dict[str, str]:
    """The model's metadata entries."""
    return {entry.key: entry.value for entry in model.metadata_props}
