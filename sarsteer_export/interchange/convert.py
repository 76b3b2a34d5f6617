"""Convert between plans and the files of other tools: read, make a plan of it, write."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from calibration.plan import Positions, SteeringPlan
from sarsteer_export.interchange import control_vector, steering_vectors, svec
from sarsteer_export.interchange.fitting import AllowedLosses, fit
from sarsteer_export.interchange.reading import Source, read_source
from sarsteer_export.interchange.vectors import LayerVectors, plan_of
from sarsteer_export.staging import check_output, check_outside_bundle, staged_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calibration.directions import SteeringSettings
    from calibration.states import CalibrationStates


class Target(str, Enum):
    """What can be written."""

    PLAN = "plan"
    GGUF = "gguf"
    STEERING_VECTORS = "steering-vectors"
    SVEC = "svec"


SUFFIXES = {
    ".safetensors": Target.PLAN,
    ".gguf": Target.GGUF,
    ".pt": Target.STEERING_VECTORS,
    ".pth": Target.STEERING_VECTORS,
    svec.SUFFIX: Target.SVEC,
}
HOLDINGS = {
    Target.GGUF: control_vector.HOLDING,
    Target.STEERING_VECTORS: steering_vectors.HOLDING,
    Target.SVEC: svec.HOLDING,
}
NAMES_MODEL = (Target.GGUF, Target.SVEC)
"""Formats with a place for the type of the model."""


@dataclass(frozen=True)
class ConversionSettings:
    """What a file does not say, and what may be lost. None: not said by the user.

    `num_layers`: decoder blocks of the model. `strength`: of read vectors. `positions`: where read vectors act.
    `layers`: blocks to keep, given their number. `alpha`, `ablation`, `rank`: for activations, as in `calibrate`.
    `model_type`: written where a format has a place for it.
    """

    num_layers: int | None = None
    strength: float | None = None
    positions: str | None = None
    layers: Callable[[int], tuple[int, ...]] | None = None
    alpha: float | None = None
    ablation: float | None = None
    rank: int | None = None
    model_type: str | None = None
    losses: AllowedLosses = field(default_factory=AllowedLosses)


@dataclass(frozen=True)
class Conversion:
    """What was written: `plan` is what it means, `notes` what a user has to know of it."""

    output: Path
    target: Target
    plan: SteeringPlan
    notes: tuple[str, ...]


def target_of(output: Path, to: str | None) -> Target:
    """What to write, by name or by the suffix of `output`."""
    if to is not None:
        return Target(to)
    if output.suffix not in SUFFIXES:
        raise InputError(
            f"{output}: the suffix says no format; expected {', '.join(SUFFIXES)}, or --to FORMAT"
        )
    return SUFFIXES[output.suffix]


def convert(
    path: str | Path,
    output: str | Path,
    settings: ConversionSettings | None = None,
    *,
    to: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read `path`, write `output`, whole or not at all. `to`: a format, where the suffix of `output` says none.

    Raises `InputError` for a file that cannot be read and options that do not go with it, `UnsupportedError` for
    what the format of `output` cannot hold.
    """
    path, output, settings = Path(path), Path(output), settings or ConversionSettings()
    target = target_of(output, to)
    if target is Target.SVEC and output.suffix != svec.SUFFIX:
        raise InputError(f"{output}: activation-steering reads files named *{svec.SUFFIX} alone; name it so")
    _check_for_target(output, target, settings)
    check_output(output, overwrite=overwrite)
    check_outside_bundle(output)
    source = read_source(path)
    plan, notes = _plan(source, settings)
    if target is not Target.PLAN:
        return _write(plan, output, target, settings, notes, overwrite=overwrite)
    if isinstance(source.content, SteeringPlan):
        raise InputError(f"{path}: is a plan already; name an output of another format")
    with staged_file(output, overwrite=overwrite) as staged:
        plan.save(staged)
    return Conversion(output, target, plan, notes)


def _plan(source: Source, settings: ConversionSettings) -> tuple[SteeringPlan, tuple[str, ...]]:
    """What a file means as a plan, and what to know of it."""
    content = source.content
    if isinstance(content, SteeringPlan):
        _only(settings, "a plan")
        _same_depth(source, content.num_layers, settings)
        return _chosen(content, settings), ()
    provenance: dict[str, Any] = {"source": {"file": source.path.name, "sha256": source.sha256}}
    if not isinstance(content, LayerVectors):
        _only(settings, "a checkpoint of activations", "alpha", "ablation", "rank")
        _same_depth(source, content.benign_NLD.shape[1], settings)
        try:
            return _from_activations(content, settings, provenance), ()
        except InputError as error:
            raise InputError(f"{source.path}: {error}") from None
    _only(settings, "a file of vectors", "strength", "positions")
    if settings.num_layers is None:
        raise InputError(
            f"{source.path}: does not say how many decoder blocks the model has; say it with --num-layers "
            "(num_hidden_layers of its config.json)"
        )
    provenance["source"] |= {"format": content.format, **content.details}
    try:
        plan = plan_of(
            content,
            num_layers=settings.num_layers,
            strength=1.0 if settings.strength is None else settings.strength,
            positions=Positions.ALL
            if settings.positions is None
            else Positions.parse(settings.positions, "--positions"),
            provenance=provenance,
        )
    except InputError as error:
        raise InputError(f"{source.path}: {error}") from None
    return _chosen(plan, settings), content.notes


def _from_activations(
    states: CalibrationStates, settings: ConversionSettings, provenance: Mapping[str, Any]
) -> SteeringPlan:
    """The plan of a checkpoint, by the equations that `calibrate` uses."""
    from calibration.directions import SteeringSettings, largest_rank, steering_plan

    given = {name: getattr(settings, name) for name in ("alpha", "ablation", "rank")}
    benign, num_layers, hidden_size = states.benign_NLD.shape
    steering: SteeringSettings = replace(
        SteeringSettings(layers=None if settings.layers is None else settings.layers(num_layers)),
        **{name: value for name, value in given.items() if value is not None},
    )
    return steering_plan(
        states,
        steering,
        {
            "method": "SARSteer (arXiv 2510.17633)",
            "source": {**provenance["source"], "format": "SARSteer activations"},
            "harmful": {"count": len(states.harmful_NLD)},
            "benign": {"count": benign},
            "alpha": steering.alpha,
            "lambda": steering.ablation,
            "rank": min(steering.rank, largest_rank(benign, hidden_size)),
            "rank_requested": steering.rank,
            "versions": {name: version(name) for name in ("sarsteer-export", "numpy")},
        },
    )


def _write(
    plan: SteeringPlan,
    output: Path,
    target: Target,
    settings: ConversionSettings,
    notes: tuple[str, ...],
    *,
    overwrite: bool,
) -> Conversion:
    fitted = fit(plan, HOLDINGS[target], settings.losses)
    model_type = settings.model_type or _model_type(plan)
    with staged_file(output, overwrite=overwrite) as staged:
        if target is Target.GGUF:
            staged.write_bytes(
                control_vector.control_vector_bytes(fitted, model_type=model_type, plan_sha256=plan.digest())
            )
        elif target is Target.SVEC:
            staged.write_bytes(svec.svec_bytes(fitted, model_type=model_type))
        else:
            steering_vectors.save_steering_vector(fitted, staged)
    return Conversion(output, target, plan, (*notes, *fitted.notes))


def _model_type(plan: SteeringPlan) -> str | None:
    """The type of model that the file a plan came from named."""
    source = plan.provenance.get("source")
    named = [source.get(key) for key in ("model_hint", "model_type")] if isinstance(source, dict) else []
    return next((name for name in named if isinstance(name, str) and name), None)


def _chosen(plan: SteeringPlan, settings: ConversionSettings) -> SteeringPlan:
    """The edits of the blocks that the user named."""
    if settings.layers is None:
        return plan
    layers = set(settings.layers(plan.num_layers))
    if missing := sorted(layers - {edit.layer for edit in plan.edits}):
        raise InputError(f"--layers: nothing in the file steers block {missing[0]}")
    return replace(plan, edits=tuple(edit for edit in plan.edits if edit.layer in layers))


def _check_for_target(output: Path, target: Target, settings: ConversionSettings) -> None:
    """Refuse options that say nothing about the format to write."""
    if settings.model_type is not None and target not in NAMES_MODEL:
        raise InputError(
            f"{output}: --model-type is {settings.model_type!r}, which a file of format {target.value} has no place "
            "for; leave it out"
        )
    if target is Target.PLAN:
        if settings.losses != AllowedLosses():
            raise InputError(
                "a plan holds every block and any positions; nothing has to be dropped or widened for one"
            )
        return
    holding = HOLDINGS[target]
    for given, held, option, what in (
        (settings.losses.drop_block_0, holding.holds_block_0, "--drop-block-0", "block 0"),
        (settings.losses.drop_last_block, holding.holds_last_block, "--drop-last-block", "the last block"),
    ):
        if given and held:
            raise InputError(
                f"{output}: {holding.name} holds the edits of {what}; {option} drops none, leave it out"
            )


def _same_depth(source: Source, num_layers: int, settings: ConversionSettings) -> None:
    if settings.num_layers not in (None, num_layers):
        raise InputError(
            f"{source.path}: is for {num_layers} decoder blocks; --num-layers says {settings.num_layers}"
        )


def _only(settings: ConversionSettings, what: str, *allowed: str) -> None:
    """Refuse options that say nothing about this kind of file; the blocks can be chosen and counted in every kind."""
    for name in ("strength", "positions", "alpha", "ablation", "rank"):
        if name not in allowed and getattr(settings, name) is not None:
            option = {"ablation": "lambda"}.get(name, name)
            raise InputError(f"--{option} says nothing about {what}, which has its own")
