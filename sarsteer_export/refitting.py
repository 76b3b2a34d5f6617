"""`refit`: swap the steering of a steered decoder, ONNX file or engine, for that of another plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from calibration.errors import InputError
from calibration.plan import Site, SteeringPlan, check_plan_fits
from engines.backends import find_backend
from engines.sidecar import ENGINE_SUFFIX, EngineRecord, sidecar_of
from graph_passes.insertion import by_anchor
from graph_passes.names import edit_names
from graph_passes.onnx_file import read_graph
from graph_passes.refit import plan_constants, refit_model
from graph_passes.selection import STRENGTH_INPUT
from graph_passes.steering_in import edit_initializers
from sarsteer_export.decoder_file import check_output_name, write_decoder
from sarsteer_export.range_guard import check_range, check_stream_range
from sarsteer_export.staging import check_output, check_outside_bundle, staged_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from engines.sidecar import NetworkConstant

ELEM_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
"""ONNX's names of the stream's element types, by numpy's."""


@dataclass(frozen=True)
class RefitResult:
    """What was written, the names of the constants that were replaced, and the hash of the plan now in it."""

    output: Path
    constants: tuple[str, ...]
    plan_sha256: str


def refit(
    path: str | Path,
    plan: str | Path | SteeringPlan,
    output: str | Path | None = None,
    *,
    force: bool = False,
    overwrite: bool = False,
    allow_overflow: bool = False,
) -> RefitResult:
    """Replace the steering constants of a steered ONNX file or engine by those of `plan`, in place or into `output`.

    The plan must have the same edits as the one that steered the file; only their values may differ. `force`
    accepts a plan that was made for another model of the same shape. `overwrite`: replace `output` if it
    exists; in place needs no leave. `allow_overflow`: only warn of float16 that cannot hold what calibration
    saw. Raises `InputError` for bad input, and for an output
    inside a bundle; for an engine also `UnsupportedError` when it was not built to be refitted, or where it
    cannot be opened.
    """
    source = Path(path)
    verbs = {".onnx": refit_graph, ENGINE_SUFFIX: refit_built_engine}
    if source.suffix not in verbs:
        raise InputError(
            f"{source}: ends in {source.suffix!r}; expected a steered ONNX file (.onnx) or an engine (.engine)"
        )
    chosen = plan if isinstance(plan, SteeringPlan) else SteeringPlan.load(plan)
    target = source if output is None else Path(output)
    check_outside_bundle(target)
    return verbs[source.suffix](
        source,
        chosen,
        target,
        force=force,
        overwrite=overwrite or output is None,
        allow_overflow=allow_overflow,
    )


def refit_graph(
    source: Path, plan: SteeringPlan, target: Path, *, force: bool, overwrite: bool, allow_overflow: bool
) -> RefitResult:
    """Refit a steered ONNX file; beside it the result shares its external data, elsewhere gets a copy."""
    graph = read_graph(source)
    check_output_name(graph, source, target)
    refitted = refit_model(graph, plan, force=force)
    check_range(plan, refitted, allow_overflow=allow_overflow)
    write_decoder(refitted, source, target, overwrite=overwrite)
    return RefitResult(target, tuple(edit_initializers(refitted)), plan.digest())


def refit_built_engine(
    source: Path, plan: SteeringPlan, target: Path, *, force: bool, overwrite: bool, allow_overflow: bool
) -> RefitResult:
    """Refit an engine; the result's sidecar lies beside it."""
    if target.suffix != ENGINE_SUFFIX:
        raise InputError(
            f"{target}: ends in {target.suffix!r}; an engine's name ends in {ENGINE_SUFFIX}, so that its sidecar can "
            "lie beside it"
        )
    check_outside_bundle(sidecar_of(target))
    check_output(sidecar_of(target), overwrite=overwrite)
    record = EngineRecord.read(sidecar_of(source))
    constants = engine_constants(record, plan, force=force)
    if record.precision in ELEM_TYPES:
        elem_type = TensorProto.DataType.Value(ELEM_TYPES[record.precision])
        check_stream_range(plan, elem_type, allow_overflow=allow_overflow)
    from engines.trt.refit import refit_engine  # imports PyTorch, in whose memory engines live

    with staged_file(target, overwrite=overwrite) as staged:
        refit_engine(source, staged, constants, find_backend(record.backend), plan_sha256=plan.digest())
    return RefitResult(target, tuple(constants), plan.digest())


def engine_constants(
    record: EngineRecord, plan: SteeringPlan, *, force: bool = False
) -> dict[str, NDArray[Any]]:
    """The values of an engine's refittable constants under another plan, by name.

    Raises `InputError` when the plan has other edits than the engine, or (unless `force`) is for another model.
    """
    held = {constant.name: constant for constant in record.steering}
    if not held:
        raise InputError("the engine holds no steering to refit; build one of a steered graph")
    fingerprint = record.graph.get("model_fingerprint")
    check_plan_fits(
        plan,
        hidden_size=_width(held.values()) or plan.hidden_size,
        num_layers=plan.num_layers,
        fingerprint=fingerprint,
        force=force,
    )
    baked = all(binding.name != STRENGTH_INPUT for binding in record.inputs)
    constants = plan_constants(plan, lambda edit: _stream_type(held, edit), baked=baked)
    if odd := sorted(held.keys() ^ constants.keys()):
        side = "the engine" if odd[0] in held else "the plan"
        raise InputError(
            f"{odd[0]!r} is a constant of {side} alone: they have other edits, or edits at other positions; "
            "build an engine of the newly patched graph instead"
        )
    names = edit_names(plan.edits)
    acting = list(dict.fromkeys(name.rpartition(".")[0] for name in held))
    for numbers in by_anchor(_Places(), plan).values():
        wanted = [names[number] for number in numbers]
        if wanted != [name for name in acting if name in wanted]:
            raise InputError(
                f"the plan's edits {', '.join(wanted)} act on one tensor in another order than the engine's; "
                "build an engine of the newly patched graph instead"
            )
    return {name: values for name, values in constants.items() if values.ndim}


def _width(held: Iterable[NetworkConstant]) -> int | None:
    """The width of the stream, as the first constant along it shows; basis_scaled is the one that lies across."""
    along = ("vector", "mean", "basis")
    return next(
        (each.shape[0] for each in held if each.shape and each.name.rpartition(".")[2] in along), None
    )


class _Places:
    """Names for the tensors of the stream: the output of a block is the input of the next."""

    def tensor(self, site: Site, layer: int) -> str:
        if site is Site.FINAL_NORM_OUTPUT:
            return str(site.value)
        return (
            f"between {layer} and {layer + 1}"
            if site is Site.BLOCK_OUTPUT
            else f"between {layer - 1} and {layer}"
        )


def _stream_type(held: Mapping[str, NetworkConstant], edit: str) -> int:
    """The element type of the stream at an edit, as its constants show it."""
    shown = held.get(f"{edit}.nothing") or held.get(f"{edit}.vector")
    return TensorProto.DataType.Value(ELEM_TYPES[shown.dtype]) if shown else int(TensorProto.FLOAT)
