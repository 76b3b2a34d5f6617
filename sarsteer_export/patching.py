"""`patch` and `unpatch`: steer a decoder file that exists already, and take the steering out again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from calibration.combine import CombineRule, combine_plans
from calibration.errors import InputError
from calibration.plan import SteeringPlan
from graph_passes.named_sites import check_flat, check_sites
from graph_passes.onnx_file import copy_external_data, external_files, read_graph, write_graph
from graph_passes.patch import PatchResult, patch_model
from graph_passes.scopes import Scope
from graph_passes.selection import SteeringInputs
from graph_passes.sites_file import read_sites
from graph_passes.unpatch import is_steered, unpatch_model
from sarsteer_export.staging import staged_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto

    from graph_passes.residual_stream import ResidualStream

GivenPlan: TypeAlias = "str | Path | SteeringPlan"


@dataclass(frozen=True)
class PatchSettings:
    """How a decoder is steered.

    `inputs`: what the steered graph is told at run time. `combine`: what is done where several plans meet. `sites`: a
    file that says where the blocks are, instead of finding them. `force`: accept plans that were made for another
    model. `replace`: take out the steering that the graph holds first.
    """

    inputs: SteeringInputs = SteeringInputs()  # noqa: RUF009 - frozen
    combine: CombineRule = CombineRule.DISJOINT
    sites: str | Path | None = None
    force: bool = False
    replace: bool = False


def patch(
    decoder: str | Path,
    plan: GivenPlan | Sequence[GivenPlan],
    output: str | Path,
    settings: PatchSettings = PatchSettings(),
    *,
    overwrite: bool = False,
) -> PatchResult:
    """Write the steered decoder beside `decoder`, sharing its external data, or elsewhere with a copy of it.

    Weights are never loaded. Several plans become one by the rule that `settings` name. Raises `InputError` for bad
    input, `SiteNotFoundError` when the graph has no residual stream to be found, `UnsupportedError` when it cannot
    tell the positions that a plan names.
    """
    source, target = Path(decoder), Path(output)
    graph = read_graph(source)
    chosen = load_plans(plan, settings.combine)
    check_output_name(graph, target)
    _refuse_to_replace_given(graph, source, target, [*_paths(plan), *_paths(settings.sites)])
    if settings.replace and is_steered(graph):
        graph = unpatch_model(graph)
    stream = None if settings.sites is None else read_checked_sites(graph, settings.sites)
    result = patch_model(graph, chosen, force=settings.force, inputs=settings.inputs, stream=stream)
    write_decoder(result.model, source, target, overwrite=overwrite)
    return result


def unpatch(steered: str | Path, output: str | Path, *, overwrite: bool = False) -> ModelProto:
    """Write the graph that `patch` steered as it was before, beside it or elsewhere with a copy of its data.

    Raises `InputError` for bad input, and when the graph holds no steering or was altered since.
    """
    source, target = Path(steered), Path(output)
    graph = read_graph(source)
    check_output_name(graph, target)
    original = unpatch_model(graph)
    write_decoder(original, source, target, overwrite=overwrite)
    return original


def _paths(given: GivenPlan | Sequence[GivenPlan] | None) -> list[Path]:
    """What is given as a path."""
    every = [given] if given is None or isinstance(given, (str, Path, SteeringPlan)) else given
    return [Path(one) for one in every if isinstance(one, (str, Path))]


def _refuse_to_replace_given(graph: ModelProto, source: Path, target: Path, given: Sequence[Path]) -> None:
    """Raise `InputError` when the output, or data copied beside it, would replace a plan or a sites file."""
    written = [target]
    if target.resolve().parent != source.resolve().parent:
        written += [target.parent / file.location for file in external_files(graph)]
    for path in given:
        if path.resolve() in {file.resolve() for file in written}:
            raise InputError(f"{path}: is read, and would be written over; name another output")


def load_plans(plans: GivenPlan | Sequence[GivenPlan], rule: CombineRule) -> SteeringPlan:
    """One plan of one or several, each loaded where it is a path."""
    given = [plans] if isinstance(plans, (str, Path, SteeringPlan)) else plans
    loaded = [plan if isinstance(plan, SteeringPlan) else SteeringPlan.load(plan) for plan in given]
    return combine_plans(loaded, rule)


def read_checked_sites(graph: ModelProto, path: str | Path) -> ResidualStream:
    """The stream of a sites file.

    Raises `InputError` when the file is wrong or `graph` has no such sites, `UnsupportedError` for a merged decoder.
    """
    check_flat(graph)
    stream = read_sites(path)
    try:
        check_sites(Scope().view(graph), stream)
    except InputError as error:
        raise InputError(f"sites file {path}: {error}") from None
    return stream


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
