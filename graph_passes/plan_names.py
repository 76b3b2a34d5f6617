"""Metadata entries in which a graph names its checkpoint and, when it is steered, its plan and its constants."""

from __future__ import annotations

from onnx import ModelProto

from calibration.errors import InputError
from graph_passes.steering_in import constants_digest

FINGERPRINT_KEY = "sarsteer.model_fingerprint"
"""Metadata entry in which an exported decoder names the checkpoint it came from."""
PLAN_KEY = "sarsteer.plan_sha256"
"""Metadata entry in which a steered decoder names its plan."""
CONSTANTS_KEY = "sarsteer.constants_sha256"
"""Metadata entry by which a steered decoder's constants can be found complete and unaltered."""


def name_plan(model: ModelProto, plan_sha256: str) -> None:
    """Write into a steered graph's metadata which plan it holds, and the digest of its steering constants."""
    present = {entry.key: entry for entry in model.metadata_props}
    for key, value in ((PLAN_KEY, plan_sha256), (CONSTANTS_KEY, constants_digest(model))):
        entry = present.get(key) or model.metadata_props.add()
        entry.key, entry.value = key, value


def without_claims(model: ModelProto) -> ModelProto:
    """A copy of a graph that says nothing of a plan; `model` itself where it says nothing."""
    if not {PLAN_KEY, CONSTANTS_KEY} & metadata(model).keys():
        return model
    bare = ModelProto()
    bare.CopyFrom(model)
    kept = [entry for entry in bare.metadata_props if entry.key not in (PLAN_KEY, CONSTANTS_KEY)]
    del bare.metadata_props[:]
    bare.metadata_props.extend(kept)
    return bare


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
