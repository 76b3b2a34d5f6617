"""`audit`: whether a graph holds a plan, completely and unaltered, read back from the graph alone.

Neither names nor metadata are trusted. What stands on the residual stream is found by structure (`audit_found.py`);
the plan is lowered again by the functions that insertion uses (`audit_expected.py`); both are compared as expressions
(`audit_signature.py`), and every edit gets its word (`audit_judged.py`), also for the wiring: nothing that the stream
feeds may be reached past an edit.

What no comparison with a plan can tell is whether the model's own weights, biases included, are the original's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_passes.audit_expected import ExpectedEdits
from graph_passes.audit_found import FoundStream
from graph_passes.audit_judged import Judgement
from graph_passes.audit_report import AuditedEdit, AuditReport
from graph_passes.insertion import opset_of
from graph_passes.plan_names import PLAN_KEY, metadata
from graph_passes.scopes import decoder_scopes

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto

    from calibration.plan import SteeringPlan
    from graph_passes.selection import LastFrom


def audit_model(
    model: ModelProto,
    plan: SteeringPlan | None = None,
    *,
    folder: Path | None = None,
    last_from: LastFrom | None = None,
) -> AuditReport:
    """Compare what stands on the residual stream of a graph with a plan; `model` is left as it is.

    `folder`: where the graph's external data lies. `last_from`: where the last position must be read from; when left
    out, from the graph's input for it where it has one, else from its attention mask, else from the last column.
    Without a plan, only what stands there is listed. Raises `SiteNotFoundError` when the graph is no decoder that
    steering can be found in, `InputError` when the plan is for another shape of model.
    """
    opset = opset_of(model)
    reports = []
    for scope in decoder_scopes(model):
        found = FoundStream(scope.view(model), opset, folder, str(scope))
        if plan is None:
            reports.append(_listed(found, str(scope)))
        else:
            judged = Judgement(found, ExpectedEdits(found, plan, last_from))
            reports.append(_reported(found, plan, judged, str(scope)))
    notes = [_claim(model, plan)]
    for report in reports:
        notes += [note for note in report.notes if note not in notes]
    return AuditReport(
        edits=tuple(edit for report in reports for edit in report.edits),
        steps=tuple(step for report in reports for step in report.steps),
        unexpected=tuple(dict.fromkeys(text for report in reports for text in report.unexpected)),
        notes=tuple(notes),
        plan_sha256=None if plan is None else plan.digest(),
    )


def _claim(model: ModelProto, plan: SteeringPlan | None) -> str:
    """What a file says of itself, which is not trusted."""
    claimed = metadata(model).get(PLAN_KEY)
    if not claimed:
        return "the file names no plan"
    other = "" if plan is None or claimed == plan.digest() else f", not by {plan.digest()[:12]}"
    return f"the file says that it is steered by plan {claimed[:12]}{other}"


def _listed(found: FoundStream, scope: str) -> AuditReport:
    """What stands on one stream, compared with nothing."""
    return AuditReport(edits=(), steps=tuple(found.steps()), unexpected=_inside(found, scope))


def _reported(found: FoundStream, plan: SteeringPlan, judged: Judgement, scope: str) -> AuditReport:
    """What stands on one stream, and the word for every edit."""
    in_scope = f" in {scope}" if scope else ""
    edits = (
        AuditedEdit(
            number=number,
            layer=edit.layer,
            site=edit.site,
            op=edit.op,
            positions=edit.positions.value,
            strength=float(edit.strength),
            finding=judged.findings[number][0],
            detail=judged.findings[number][1],
            scope=scope,
        )
        for number, edit in enumerate(plan.edits)
    )
    return AuditReport(
        edits=tuple(edits),
        steps=tuple(found.steps()),
        unexpected=(*(f"{text}{in_scope}" for text in judged.unexpected), *_inside(found, scope)),
        notes=tuple(judged.notes),
    )


def _inside(found: FoundStream, scope: str) -> tuple[str, ...]:
    """Lines for what stands where no edit can."""
    in_scope = f" in {scope}" if scope else ""
    return tuple(
        f"{step.what} stands {step.place}, where no edit can ({step.node}){in_scope}"
        for step in found.inside_steps()
    )
