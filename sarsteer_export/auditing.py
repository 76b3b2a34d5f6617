"""`audit`: whether a decoder, a bundle or an engine is steered by a plan, completely and unaltered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import TensorProto

from calibration.combine import CombineRule
from calibration.errors import InputError
from engines.sidecar import ENGINE_SUFFIX, EngineRecord, sidecar_of
from graph_passes.audit import audit_model
from graph_passes.audit_report import AuditReport
from graph_passes.onnx_file import read_graph
from graph_passes.plan_names import PLAN_KEY, metadata
from graph_passes.refit import plan_constants
from graph_passes.selection import STRENGTH_INPUT
from sarsteer_export.bundle.manifest import (
    ENGINES_FOLDER,
    ONNX_FOLDER,
    STEERED_DECODER,
    Manifest,
    file_sha256,
)
from sarsteer_export.patching import load_plans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.plan import SteeringPlan
    from graph_passes.selection import LastFrom
    from sarsteer_export.patching import GivenPlan

OPAQUE = "an engine's own content cannot be read back without its runtime and its GPU; "
DECODER_ENGINE = f"decoder{ENGINE_SUFFIX}"
"""What a decoder's engine in a bundle is called."""
BUNDLE_DEPTH = 2
"""An engine lies this many folders below its bundle: `engines/<label>/`."""


def audit(
    path: str | Path,
    plan: GivenPlan | Sequence[GivenPlan] | None = None,
    *,
    last_from: LastFrom | None = None,
    on_paper: bool = False,
) -> AuditReport:
    """Compare an ONNX file, a bundle folder or an engine with a plan, or with several that act one after another.

    What is compared is read back from the graph alone; names and metadata are reported, not trusted. `last_from`:
    where the last position must be read from, by default what the graph's inputs say, its attention mask before
    all. `on_paper`: take a sidecar's word for an engine whose ONNX file is not there to be read. Without a plan, the
    report lists what stands on the residual stream. Raises `InputError` for bad input, `SiteNotFoundError` when a
    graph is no decoder that steering can be found in.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    wanted = None if plan is None else load_plans(plan, CombineRule.SEQUENCE)
    if source.is_dir():
        return _audit_bundle(source, wanted, last_from, on_paper=on_paper)
    if source.suffix == ENGINE_SUFFIX:
        report = _audit_engine(source, wanted, last_from)
        return report if on_paper or not report.on_paper else _unread(report)
    if source.suffix != ".onnx":
        raise InputError(f"{source}: expected an ONNX file (.onnx), an engine (.engine) or a bundle folder")
    return _audit_graph(source, wanted, last_from)


def _audit_graph(path: Path, plan: SteeringPlan | None, last_from: LastFrom | None) -> AuditReport:
    return audit_model(read_graph(path), plan, folder=path.parent, last_from=last_from)


def _audit_bundle(
    folder: Path, plan: SteeringPlan | None, last_from: LastFrom | None, *, on_paper: bool
) -> AuditReport:
    """The bundle's steered decoder, and whether its files are those of its manifest."""
    manifest = Manifest.read(folder)
    report = _audit_graph(folder / STEERED_DECODER, plan, last_from)
    for engine in sorted(folder.glob(f"{ENGINES_FOLDER}/*/{DECODER_ENGINE}")):
        judged = _audit_engine(engine, plan, last_from)
        where = engine.relative_to(folder)
        failures = (_unread(judged) if judged.on_paper and not on_paper else judged).failures()
        report = dataclasses.replace(
            report,
            unexpected=(*report.unexpected, *(f"{where}: {failure}" for failure in failures)),
            notes=(*report.notes, *(f"{where}: {note}" for note in judged.notes[-1:])),
        )
    strays = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.glob(f"{ENGINES_FOLDER}/**/*{ENGINE_SUFFIX}"))
        if path.relative_to(folder).as_posix() not in manifest.files
    ]
    altered = [name for name in manifest.files if manifest.altered(folder, [name]) is not None]
    if STEERED_DECODER.as_posix() not in manifest.files:
        altered.append(STEERED_DECODER.as_posix())
    hashes = f"the hashes of its {len(manifest.files)} files are the manifest's" if not altered else ""
    claims = f"the manifest says plan {manifest.plan_sha256[:12]}, parity {manifest.parity['verdict']}"
    return dataclasses.replace(
        report,
        unexpected=(
            *report.unexpected,
            *(f"{name} is not the file of the manifest" for name in altered),
            *(f"{name} is an engine that the manifest does not name" for name in strays),
        ),
        notes=(*report.notes, claims, *([hashes] if hashes else [])),
    )


def _audit_engine(path: Path, plan: SteeringPlan | None, last_from: LastFrom | None) -> AuditReport:
    """The sidecar against the engine's file and the plan, and the ONNX file that the engine was built from."""
    record = EngineRecord.read(sidecar_of(path))
    wrong = []
    if file_sha256(path) != record.engine["sha256"]:
        wrong.append("the engine is not the file that its sidecar describes: another sha256")
    if plan is not None:
        if record.plan_sha256 != plan.digest():
            said = f"plan {record.plan_sha256[:12]}" if record.plan_sha256 else "no plan"
            wrong.append(f"the sidecar names {said}; expected {plan.digest()[:12]}")
        wrong += _odd_constants(record, plan)
    claims = f"the sidecar says plan {(record.plan_sha256 or 'none')[:12]}, {len(record.steering)} constants"
    graph = _graph_of(path, record)
    if graph is None:
        note = (
            OPAQUE
            + "the ONNX file that it was built from lies neither beside it nor in its bundle, so that this "
        )
        note += "rests on the sidecar alone"
        return _on_paper(record, plan, wrong, (claims, note))
    if record.refit.constants and metadata(read_graph(graph)).get(PLAN_KEY) != record.plan_sha256:
        note = (
            OPAQUE
            + f"{graph.name}, which it was built from, holds another plan: the engine was refitted since, and "
        )
        note += "this rests on the sidecar alone"
        return _on_paper(record, plan, wrong, (claims, note))
    report = _audit_graph(graph, plan, last_from)
    note = OPAQUE + f"audited is {graph.name}, from which it was built as its sidecar says"
    return dataclasses.replace(
        report, unexpected=(*wrong, *report.unexpected), notes=(*report.notes, claims, note)
    )


def _unread(report: AuditReport) -> AuditReport:
    """The report of an engine that nothing but its sidecar speaks for."""
    text = "the engine was not read: nothing but its sidecar speaks for it; --on-paper accepts that"
    return dataclasses.replace(report, unexpected=(*report.unexpected, text))


def _odd_constants(record: EngineRecord, plan: SteeringPlan) -> list[str]:
    """How the steering constants that a sidecar lists differ from the plan's, in names and shapes."""
    baked = all(binding.name != STRENGTH_INPUT for binding in record.inputs)
    wanted = {
        name: values.shape
        for name, values in plan_constants(plan, lambda _: int(TensorProto.FLOAT), baked=baked).items()
    }
    held = {constant.name: constant.shape for constant in record.steering}
    odd = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    return [
        f"the sidecar lists {name!r} of shape {held.get(name, 'none')}; the plan has shape {wanted.get(name, 'none')}"
        for name in odd[:1]
    ]


def _on_paper(
    record: EngineRecord, plan: SteeringPlan | None, wrong: Sequence[str], notes: tuple[str, ...]
) -> AuditReport:
    missing = [] if record.steering else ["the sidecar names no steering"]
    return AuditReport(
        edits=(),
        steps=(),
        unexpected=(*wrong, *(missing if plan is None else [])),
        notes=notes,
        plan_sha256=None if plan is None else plan.digest(),
        on_paper=True,
    )


def _graph_of(engine: Path, record: EngineRecord) -> Path | None:
    """The ONNX file that an engine was built from, where it lies beside the engine or in the engine's bundle."""
    name = str(record.graph.get("file", ""))
    if not name or Path(name).name != name:
        return None
    folders = [
        engine.parent,
        *(parent / ONNX_FOLDER for parent in engine.resolve().parents[: BUNDLE_DEPTH + 1]),
    ]
    for folder in folders:
        if (folder / name).is_file() and file_sha256(folder / name) == record.graph.get("sha256"):
            return folder / name
    return None
