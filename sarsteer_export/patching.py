"""`patch` and `unpatch`: steer a decoder file that exists already, and take the steering out again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from calibration.combine import CombineRule, combine_plans
from calibration.errors import InputError
from calibration.plan import SteeringPlan
from graph_passes.named_sites import check_flat, check_sites
from graph_passes.onnx_file import read_graph
from graph_passes.patch import PatchResult, patch_model
from graph_passes.plan_names import without_claims
from graph_passes.scopes import Scope
from graph_passes.selection import SteeringInputs
from graph_passes.sites_file import read_sites
from graph_passes.unpatch import is_steered, unpatch_model
from sarsteer_export.decoder_file import check_output_name, write_decoder
from sarsteer_export.range_guard import check_range
from sarsteer_export.staging import check_outside_bundle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import ModelProto

    from graph_passes.external_copy import Progress
    from graph_passes.residual_stream import ResidualStream

GivenPlan: TypeAlias = "str | Path | SteeringPlan"


@dataclass(frozen=True)
class PatchSettings:
    """How a decoder is steered.

    `inputs`: what the steered graph is told at run time. `combine`: what is done where several plans meet. `sites`: a
    file that says where the blocks are, instead of finding them. `force`: accept plans that were made for another
    model. `replace`: take out the steering that the graph holds first. `copy`: give the output data of its own,
    `<output>.data`, beside the decoder too. `allow_overflow`: only warn of float16 that cannot hold what calibration
    saw.
    """

    inputs: SteeringInputs = SteeringInputs()  # noqa: RUF009 - frozen
    combine: CombineRule = CombineRule.DISJOINT
    sites: str | Path | None = None
    force: bool = False
    replace: bool = False
    copy: bool = False
    allow_overflow: bool = False


def patch(
    decoder: str | Path,
    plan: GivenPlan | Sequence[GivenPlan],
    output: str | Path,
    settings: PatchSettings = PatchSettings(),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PatchResult:
    """Write the steered decoder beside `decoder`, sharing its external data, or elsewhere with a copy of it.

    Weights are never loaded; `progress` is told of a copy as it grows. Several plans become one by the rule that
    `settings` name. Raises `InputError` for bad input, `SiteNotFoundError` when the graph has no residual stream to
    be found, `UnsupportedError` when it cannot tell the positions that a plan names.
    """
    source, target = Path(decoder), Path(output)
    check_outside_bundle(target)
    graph = read_graph(source)
    chosen = load_plans(plan, settings.combine)
    check_output_name(graph, source, target)
    if settings.replace:
        graph = unpatch_model(graph) if is_steered(graph) else without_claims(graph)
    stream = None if settings.sites is None else read_checked_sites(graph, settings.sites)
    result = patch_model(graph, chosen, force=settings.force, inputs=settings.inputs, stream=stream)
    check_range(chosen, graph, stream=result.stream, allow_overflow=settings.allow_overflow)
    write_decoder(
        result.model,
        source,
        target,
        overwrite=overwrite,
        copy=settings.copy,
        kept=[*_paths(plan), *_paths(settings.sites)],
        progress=progress,
    )
    return result


def unpatch(steered: str | Path, output: str | Path, *, overwrite: bool = False) -> ModelProto:
    """Write the graph that `patch` steered as it was before, beside it or elsewhere with a copy of its data.

    Raises `InputError` for bad input, and when the graph holds no steering or was altered since.
    """
    source, target = Path(steered), Path(output)
    graph = read_graph(source)
    check_output_name(graph, source, target)
    check_outside_bundle(target)
    original = unpatch_model(graph)
    write_decoder(original, source, target, overwrite=overwrite)
    return original


def _paths(given: GivenPlan | Sequence[GivenPlan] | None) -> list[Path]:
    """What is given as a path."""
    every = [given] if given is None or isinstance(given, (str, Path, SteeringPlan)) else given
    return [Path(one) for one in every if isinstance(one, (str, Path))]


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
