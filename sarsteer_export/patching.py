"""`patch`: steer a decoder file that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.plan import SteeringPlan
from graph_passes.onnx_file import copy_external_data, external_files, read_graph, write_graph
from graph_passes.patch import LastFrom, PatchResult, patch_model
from sarsteer_export.range_guard import check_range
from sarsteer_export.staging import check_outside_bundle, staged_file

if TYPE_CHECKING:
    from onnx import ModelProto


def patch(
    decoder: str | Path,
    plan: str | Path | SteeringPlan,
    output: str | Path,
    *,
    force: bool = False,
    last_from: LastFrom = LastFrom.ATTENTION_MASK,
    overwrite: bool = False,
    allow_overflow: bool = False,
) -> PatchResult:
    """Write the steered decoder beside `decoder`, sharing its external data, or elsewhere with a copy of it.

    Weights are never loaded. `allow_overflow`: only warn of float16 that cannot hold what calibration saw. Raises
    `InputError` for bad input, `SiteNotFoundError` when the graph has no residual stream to be found.
    """
    source, target = Path(decoder), Path(output)
    check_outside_bundle(target)
    graph = read_graph(source)
    chosen = plan if isinstance(plan, SteeringPlan) else SteeringPlan.load(plan)
    check_output_name(graph, target)
    result = patch_model(graph, chosen, force=force, last_from=last_from)
    check_range(chosen, graph, stream=result.stream, allow_overflow=allow_overflow)
    write_decoder(result.model, source, target, overwrite=overwrite)
    return result


def check_output_name(graph: ModelProto, target: Path) -> None:
    """Raise `InputError` when `target` is named as the external data of `graph`, which it would replace."""
    if target.name in {file.location for file in external_files(graph)}:
        raise InputError(f"{target}: is the name of the decoder's external data; name another output")


def write_decoder(graph: ModelProto, source: Path, target: Path, *, overwrite: bool) -> None:
    """Write a graph made from `source`: beside it sharing its external data, elsewhere with a copy of it.

    Raises `InputError` when the output, or data that would be copied, exists and may not be overwritten.
    """
    with staged_file(target, overwrite=overwrite) as staged:
        if target.resolve().parent != source.resolve().parent:
            _refuse_to_replace_data(graph, target, overwrite=overwrite)
            copy_external_data(graph, source.parent, staged.parent)
        write_graph(graph, staged)


def _refuse_to_replace_data(graph: ModelProto, target: Path, *, overwrite: bool) -> None:
    taken = [file.location for file in external_files(graph) if (target.parent / file.location).exists()]
    if taken and not overwrite:
        raise InputError(
            f"{target.parent / taken[0]}: exists; the decoder's external data would replace it; use --overwrite, "
            "or another folder"
        )
