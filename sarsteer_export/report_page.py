"""The parity report as one HTML page: what a deployment engineer opens to decide whether to ship.

The page needs nothing beside itself: no scripts, and styles and plots inline. All text goes through jinja2's
escaping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from engines.report import Verdict
from sarsteer_export.report_plots import Plot, edit_size_plot, effect_cosine_plot, logits_difference_plot
from sarsteer_export.report_template import TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NEAR_ONE = 1e-3
"""Figures this close to 1 are written as their distance from it: 0.9999999999 and 0.9999 look alike."""
BEST_IS_ONE = 0.5
"""A figure that must be at least a limit above this is a cosine or a share, which cannot be better than 1."""
MANY_TIMES = 1e6
HEADLINES = {
    Verdict.PASSED: "Every figure keeps its limit.",
    Verdict.FAILED: "The engine does not do what the steered eager model does. Do not ship it.",
    Verdict.NOT_EXECUTED: (
        "The engine was built and never run: nothing is known of what it computes. "
        "Run the verification where it can be executed before it is shipped."
    ),
}
STYLES = {Verdict.PASSED: "pass", Verdict.FAILED: "fail", Verdict.NOT_EXECUTED: "open"}
LABELS = {
    "backend": "Backend",
    "precision": "Precision",
    "model": "Model",
    "model_fingerprint": "Model fingerprint (sha256)",
    "plan_sha256": "Plan digest (sha256)",
    "edits": "Edits in the plan",
    "prompts": "Prompts per script",
    "decode_steps": "Decode steps after the prefill",
    "blocks": "Block outputs compared",
    "torch_threads": "Threads of the oracle",
}


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown: `exact` is its full value, `headroom` how many times it could worsen."""

    text: str
    exact: str
    headroom: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Row:
    """A figure over the columns of its table; None where it was not measured."""

    what: str
    limit: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Group:
    """Figures of one kind (baseline, edited, effect), a column per script."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Highlight:
    """One line of the summary under the verdict."""

    name: str
    value: str
    note: str


def parity_page(report: Mapping[str, Any]) -> str:
    """The report, as `ParityReport.to_json` gives it, as one self-contained HTML page.

    Equal reports give equal pages. Figures that are not finite may be strings.
    """
    verdict, cases, context = Verdict(report["verdict"]), report["cases"], report["context"]
    blocks = context.get("blocks") or []
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE).render(
        verdict=verdict.value,
        style=STYLES[verdict],
        headline=HEADLINES[verdict] + _controls_text(verdict, cases),
        failures=report["failures"],
        highlights=list(_highlights(report)),
        facts=list(_facts(report)),
        limits_source=report["limits_source"],
        groups=_groups(report),
        cases=cases,
        plots=_plots(cases, blocks, report["limits"]),
    )


def figure_text(value: float | str) -> str:
    """A figure for people, three digits; close to 1 as its distance from 1.

    >>> figure_text(0.9999999999), figure_text(4.918e-07), figure_text("nan")
    ('1 − 1e-10', '4.92e-07', 'nan')
    """
    number = float(value)
    distance = number - 1
    if 0 < abs(distance) < NEAR_ONE:
        return f"1 {'+' if distance > 0 else '−'} {abs(distance):.3g}"
    return f"{number:.3g}"


def headroom(figure: Mapping[str, Any]) -> float | None:
    """How many times a figure's deviation could grow before its limit breaks; below 1 when it is broken.

    The deviation of a cosine or a share is its distance from 1. None where there is no such factor: the
    limit allows no deviation at all, or the figure is not a finite number.
    """
    value, limit = float(figure["value"]), float(figure["limit"])
    if not figure["at_least"]:
        deviation, allowed = value, limit
    elif limit > BEST_IS_ONE:
        deviation, allowed = 1 - value, 1 - limit
    else:
        deviation, allowed = limit, value
    if not (math.isfinite(deviation) and allowed > 0):
        return None
    return allowed / deviation if deviation > 0 else math.inf


def _headroom_text(figure: Mapping[str, Any]) -> str:
    times = headroom(figure)
    if times is None:
        return "exact" if figure["passed"] else "none"
    if times >= MANY_TIMES:
        return "> 10⁶\N{NO-BREAK SPACE}×"
    number = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    return f"{number}\N{NO-BREAK SPACE}×"


def _cell(figure: Mapping[str, Any]) -> Cell:
    return Cell(
        text=figure_text(figure["value"]),
        exact=str(figure["value"]),
        headroom=_headroom_text(figure),
        passed=figure["passed"],
        detail=figure["detail"],
    )


def _groups(report: Mapping[str, Any]) -> tuple[Group, ...]:
    """The figures by kind, scripts side by side; those of no script first."""
    names = tuple(case["case"] for case in report["cases"])
    kinds: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for case in report["cases"]:
        for figure in case["measurements"]:
            kind = figure["case"].removeprefix(case["case"]).removeprefix(", ")
            kinds.setdefault(kind, {}).setdefault(figure["what"], {})[case["case"]] = figure
    components: dict[str, dict[str, Mapping[str, Any]]] = {}
    for figure in report["components"]:
        components.setdefault(figure["what"], {})[figure["case"]] = figure
    columns = tuple(dict.fromkeys(figure["case"] for figure in report["components"]))
    groups = [Group("Components", columns, _rows(components, columns))] if components else []
    groups += [Group(kind.capitalize(), names, _rows(figures, names)) for kind, figures in kinds.items()]
    return tuple(groups)


def _rows(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], columns: Sequence[str]) -> tuple[Row, ...]:
    rows = []
    for what, by_column in figures.items():
        some = next(iter(by_column.values()))
        limit = f"{'≥' if some['at_least'] else '≤'} {figure_text(some['limit'])}"
        cells = tuple(_cell(by_column[name]) if name in by_column else None for name in columns)
        rows.append(Row(what, limit, cells))
    return tuple(rows)


def _controls_text(verdict: Verdict, cases: Sequence[Mapping[str, Any]]) -> str:
    if verdict is not Verdict.PASSED:
        return ""
    if any(case["controls"] for case in cases):
        return " Every engine that was wrong on purpose was caught."
    return " No engine that is wrong on purpose was tried."


def _highlights(report: Mapping[str, Any]) -> Iterable[Highlight]:
    figures = [item for case in report["cases"] for item in case["measurements"]] + report["components"]
    if not report["cases"]:
        return
    judged = [item for item in figures if headroom(item) is not None or not item["passed"]]
    if judged:
        least = min(judged, key=lambda item: headroom(item) or 0.0)
        yield Highlight("Least headroom", _headroom_text(least), f"{least['what']} ({least['case']})")
    effects = [item for item in figures if item["what"].endswith("effect cosine")]
    if effects:
        worst = min(effects, key=lambda item: (item["passed"], float(item["value"])))
        yield Highlight(
            "Worst effect cosine",
            figure_text(worst["value"]),
            f"{worst['what']} ({worst['case']}); limit {figure_text(worst['limit'])}",
        )
    controls = [control for case in report["cases"] for control in case["controls"]]
    if controls:
        caught = sum(control["caught"] for control in controls)
        yield Highlight(
            "Wrong engines caught", f"{caught} of {len(controls)}", "negative controls, all scripts"
        )


def _facts(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What was compared, by label; what the context holds beyond the known comes under its own name."""
    context = dict(report["context"])
    context.pop("blocks", None)
    settings, versions = context.pop("settings", {}), context.pop("versions", {})
    facts = {name: report[name] for name in ("backend", "precision")}
    facts |= {name: value for name, value in (context | settings).items() if name not in facts}
    for name, label in LABELS.items():
        if name in facts:
            yield label, _fact_text(facts[name])
    for name, value in facts.items():
        if name not in LABELS:
            yield name, _fact_text(value)
    if report["cases"]:
        yield "Scripts", ", ".join(case["case"] for case in report["cases"])
    for note in report["notes"]:
        what, _, finding = note.partition(": ")
        yield what.capitalize(), finding
    if versions:
        yield "Versions", ", ".join(f"{name} {number}" for name, number in versions.items())


def _fact_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _plots(
    cases: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]
) -> tuple[Plot, ...]:
    if not cases:
        return ()
    return (
        effect_cosine_plot(cases, [block["layer"] for block in blocks], limits),
        edit_size_plot(blocks),
        logits_difference_plot(cases, limits),
    )
