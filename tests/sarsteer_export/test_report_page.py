"""The parity page: everything the report holds, nothing from elsewhere, and safe to open."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from engines.limits import Limits
from engines.parity import CaseResult, Control, Effect, Measurement
from engines.report import ParityReport, Verdict
from sarsteer_export.report_page import figure_text, headroom, parity_page

SVG = "{http://www.w3.org/2000/svg}"
LIMITS = Limits(
    max_abs=1e-4,
    cosine=0.999999,
    kl=1e-6,
    top1=1.0,
    effect_cosine=0.9999,
    effect_ratio=1e-3,
    effect_floor=1e-5,
    source="measured on the pocket LALM",
)
VOID = {"meta", "br", "hr", "img", "input", "link"}


def case(name: str = "left padding", **changes: object) -> CaseResult:
    result = CaseResult(
        case=name,
        measurements=(
            Measurement(f"{name}, baseline", "logits max abs, relative", 4.918e-07, 1e-4, at_least=False),
            Measurement(f"{name}, edited", "logits cosine", 0.9999999999998843, 0.999999, at_least=True),
            Measurement(f"{name}, edited", "top-1 agreement", 1.0, 1.0, at_least=True),
            Measurement(f"{name}, effect", "block effect cosine", 0.99999, 0.9999, True, "1 not judged"),
        ),
        effects=(
            Effect(0, 0, "logits", 0.5, 1.0, 0.1),
            Effect(0, 0, "add_4", 1.0, 1.0, 0.1),
            Effect(0, 0, "add_9", 0.99999, 1.0, 0.1),
            Effect(0, 0, "add_2", -1.0, 1.0, 1e-9),
        ),
        controls=(Control("unsteered", ("logits KL", "KV cosine")), Control("wrong sign", ("KV cosine",))),
        logits_difference=(3e-7, 4e-7),
    )
    return dataclasses.replace(result, **changes)


def report(*cases: CaseResult, **changes: object) -> ParityReport:
    whole = ParityReport(
        backend="onnxruntime-cpu",
        precision="float32",
        limits=LIMITS,
        components=(
            Measurement("before the decoder", "log-mel max abs", 8.8214874e-06, 1e-3, at_least=False),
        ),
        cases=cases,
        context={
            "settings": {
                "prompts": 4,
                "decode_steps": 8,
                "blocks": True,
                "backend": "onnxruntime-cpu",
                "precision": "float32",
            },
            "plan_sha256": "34268c1d",
            "model": "Qwen2AudioForConditionalGeneration",
            "edits": 3,
            "blocks": [
                {"layer": 0, "hidden_norm": 2.0, "edit_norm": 0.5},
                {"layer": 1, "hidden_norm": 4.0, "edit_norm": 0.5},
                {"layer": 2, "hidden_norm": None, "edit_norm": 0.5},
            ],
            "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        },
    )
    return dataclasses.replace(whole, **changes)


def page_of(*cases: CaseResult, **changes: object) -> str:
    return parity_page(report(*cases, **changes).to_json())


class Reader(HTMLParser):
    """Checks that elements are closed in order, and gathers text, attributes and figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def plots_of(page: str) -> dict[str, ElementTree.Element]:
    """The plots by title; raises when one is not well-formed XML."""
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314
    return {str(plot.findtext(f"{SVG}title")): plot for plot in plots}


def description(page: str, title: str) -> str:
    return str(next(plot for name, plot in plots_of(page).items() if title in name).findtext(f"{SVG}desc"))


def drawn_text(page: str) -> str:
    return " ".join(
        text
        for plot in plots_of(page).values()
        for node in plot.iter(f"{SVG}text")
        for text in node.itertext()
    )


@pytest.mark.parametrize("cases", [(), (case(),), (case(), case("right padding"))])
def test_the_page_is_well_formed_and_its_ids_are_unique(cases: tuple[CaseResult, ...]) -> None:
    page = page_of(*cases)
    read = Reader(page)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(plots_of(page)) == (3 if cases else 0)
    for reference in re.findall(r'(?:url\(#|href="#)([^)"]+)', page):
        assert reference in ids


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = page_of(case())
    addresses = set(re.findall(r"[a-z]+://[^\"'\s<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    tags = Reader(page).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [attributes for _, attributes in tags if "src" in attributes]
    assert "@import" not in page


def test_every_figure_stands_in_a_table_with_its_limit_and_its_exact_value() -> None:
    whole = report(case(), case("right padding"))
    read = Reader(parity_page(whole.to_json()))
    exact = sorted(attributes["value"] or "" for tag, attributes in read.tags if tag == "data")
    assert exact == sorted(str(item.value) for item in whole.measurements)
    for item in whole.measurements:
        row = (
            f"{item.what} {'≥' if item.at_least else '≤'} {figure_text(item.limit)} {figure_text(item.value)}"
        )
        assert row in read.text
    assert "1 not judged" in read.text


def test_what_was_compared_is_said() -> None:
    text = Reader(page_of(case(), case("right padding"))).text
    for fact in (
        "Backend onnxruntime-cpu",
        "Precision float32",
        "Model Qwen2AudioForConditionalGeneration",
        "Plan digest (sha256) 34268c1d",
        "Edits in the plan 3",
        "Prompts per script 4",
        "Decode steps after the prefill 8",
        "Block outputs compared yes",
        "Scripts left padding, right padding",
        "Versions torch 2.13.0, numpy 2.4.6",
        "Where the limits come from measured on the pocket LALM",
    ):
        assert fact in text


def test_a_fact_that_the_page_does_not_know_is_shown_by_its_own_name() -> None:
    assert "driver 580.1" in Reader(page_of(case(), context={"driver": "580.1"})).text


def test_a_passed_verdict_comes_first() -> None:
    page = page_of(case())
    assert "<h1>Passed</h1>" in page
    assert page.index("<h1>") < page.index("<table")
    assert "Every engine that was wrong on purpose was caught." in page
    assert "FAILED" not in page


def test_a_failed_verdict_names_what_failed_before_anything_else() -> None:
    broken = Measurement("left padding, edited", "logits cosine", 0.25, 0.999999, at_least=True)
    failed = report(case(measurements=(broken,), controls=(Control("wrong sign", ()),)))
    page = parity_page(failed.to_json())
    assert "<h1>Failed</h1>" in page
    top = Reader(page[page.index("<header") : page.index("</header>") + len("</header>")]).text
    assert len(failed.failures()) == 2
    for failure in failed.failures():
        assert failure in top
    text = Reader(page).text
    assert "0.25 FAILED" in text
    assert "wrong sign NOT CAUGHT" in text


def test_an_engine_that_was_not_executed_is_not_called_passed() -> None:
    whole = report()
    assert whole.verdict is Verdict.NOT_EXECUTED
    text = Reader(parity_page(whole.to_json())).text
    assert "Built, not executed" in text
    assert "Passed" not in text
    assert "Least headroom" not in text


def test_each_control_is_shown_with_what_caught_it() -> None:
    text = Reader(page_of(case())).text
    assert "unsteered 2: logits KL · KV cosine" in text
    assert "wrong sign 1: KV cosine" in text
    assert "Wrong engines caught 2 of 2" in text


def test_a_report_at_strength_0_has_neither_effects_nor_controls() -> None:
    equal = Measurement("left padding, effect", "bit-equal at strength 0", 1.0, 1.0, at_least=True)
    unmoved = [{"layer": 0, "hidden_norm": 2.0, "edit_norm": 0.0}]
    page = page_of(case(measurements=(equal,), effects=(), controls=()), context={"blocks": unmoved})
    text = Reader(page).text
    assert "No effect was measured at block outputs." in text
    assert "No edit adds anything" in text
    assert "No engine that is wrong on purpose was tried." in text
    assert "left padding: no control was run." in text
    assert len(plots_of(page)) == 1


def test_figures_that_are_not_finite_are_shown_and_not_drawn() -> None:
    wrong = Measurement("left padding, edited", "logits KL", float("nan"), 1e-6, at_least=False)
    effects = (Effect(0, 0, "add_4", float("nan"), float("inf"), float("inf")), *case().effects)
    page = page_of(case(measurements=(wrong,), effects=effects, logits_difference=(float("inf"), 2e-7)))
    text = Reader(page).text
    assert "logits KL ≤ 1e-06 nan FAILED, margin none" in text
    assert "Least headroom none logits KL" in text
    assert "Not finite, not drawn: 1 effects." in text
    assert "1 points, lowest 2e-07 at step 1" in description(page, "Logits")


def test_text_of_the_report_is_escaped() -> None:
    bad = "<script>alert('&')</script>"
    context = {"model": bad, bad: bad, "versions": {bad: bad}}
    broken = Measurement(f"{bad}, edited", bad, 2.0, 1.0, at_least=False, detail=bad)
    page = page_of(
        case(bad, measurements=(broken,), controls=(Control(bad, (bad,)),)),
        context=context,
        backend=bad,
        limits=dataclasses.replace(LIMITS, source=bad),
    )
    read = Reader(page)
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.text.count("alert('&')") > 10
    assert bad in drawn_text(page)


def test_dollar_signs_in_names_are_text_in_plots() -> None:
    assert r"a $\frac{ b$" in drawn_text(page_of(case(r"a $\frac{ b$")))


def test_equal_reports_give_equal_pages_and_leave_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    assert page_of(case()) == page_of(case())
    assert dict(mpl.rcParams) == before


def test_plots_say_in_words_what_they_show() -> None:
    page = page_of(case(logits_difference=(3e-7, 4e-7, 1e-7)))
    effect = description(page, "Effect")
    assert "2 points, lowest 1e-16 at block 0, highest 1e-05 at block 1" in effect
    assert "lowest 0.12 at block 1, highest 0.25 at block 0" in description(page, "Size")
    assert "3 points, lowest 1e-07 at step 2, highest 4e-07 at step 1" in description(page, "Logits")
    text = Reader(page).text
    assert "No effect above the floor of 1e-05, not judged: block 2." in text
    assert "Norm not measured: block 2." in text


def test_plots_have_axis_labels_with_units_and_the_limit() -> None:
    drawn = drawn_text(page_of(case()))
    for label in (
        "decoder block (0-based)",
        "1 − cosine (no unit)",
        "‖αv⊥‖ / ‖h‖ (no unit)",
        "step (0 = prefill, then decode)",
        "max |engine − oracle| (logits)",
        "limit 0.0001",
        "10⁻⁷",
    ):
        assert label in drawn


def test_plots_take_every_colour_from_the_page() -> None:
    page = page_of(case(), case("right padding"))
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svgs)) == {
        "none",
        "currentColor",
        "var(--rule)",
        "var(--fail)",
        "var(--series-1)",
        "var(--series-2)",
    }
    assert "@media (prefers-color-scheme: dark)" in page


def test_every_table_header_says_what_it_heads() -> None:
    headers = [attributes for tag, attributes in Reader(page_of(case())).tags if tag == "th"]
    assert headers
    assert {attributes.get("scope") for attributes in headers} == {"col", "row"}


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "expected"),
    [
        (5e-7, 1e-4, False, 200),
        (2e-4, 1e-4, False, 0.5),
        (1 - 1e-8, 1 - 1e-6, True, 100),
        (0.9, 1e-5, True, 9e4),
        (0.0, 1e-4, False, float("inf")),
        (1.0, 1.0, True, None),
        ("nan", 1e-4, False, None),
        ("inf", 1e-4, False, None),
    ],
)
def test_headroom_is_how_often_the_deviation_fits_its_limit(
    value: float | str, limit: float, at_least: bool, expected: float | None
) -> None:
    found = headroom({"value": value, "limit": limit, "at_least": at_least})
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-6))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9999999999, "1 − 1e-10"),
        (1.00001, "1 + 1e-05"),
        (1.0, "1"),
        (0.97, "0.97"),
        (4.918e-07, "4.92e-07"),
        (0.0, "0"),
        ("nan", "nan"),
        ("-inf", "-inf"),
    ],
)
def test_figures_close_to_1_are_written_as_their_distance_from_it(value: float | str, text: str) -> None:
    assert figure_text(value) == text
