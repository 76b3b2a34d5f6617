"""docs/results.md has what the page is made of, and the README shows the same rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from results_page import README_END, README_START, SUMMARY
from sarsteer_export.evaluation.figures import FIGURES
from sarsteer_export.evaluation.report import figure_title

ROOT = Path(__file__).parents[2]
SYSTEMS = (
    "undefended",
    "refusal vector alone",
    "with ablation",
    "random, refusal vector alone",
    "random, with ablation",
)
RUNTIMES = ("eager", "onnxruntime-cpu")
CELL = re.compile(r"^([+-]?\d\.\d\d) \[([+-]?\d\.\d\d), ([+-]?\d\.\d\d)\](\\\*)?$")


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a text: its rows, heading first, as cells."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    rows = [
        [line.strip("|").split("|") for line in table.splitlines() if " --- " not in line] for table in found
    ]
    return [[[cell.strip() for cell in row] for row in table] for table in rows]


@pytest.fixture(scope="module")
def results() -> str:
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_system_is_there_on_both_runtimes(results: str) -> None:
    summary, everything, changes = tables(results)
    for table in (summary, everything):
        assert [tuple(row[:2]) for row in table[1:]] == [
            (system, runtime) for runtime in RUNTIMES for system in SYSTEMS
        ]
    assert summary[0][2:] == [figure_title(name) for name in SUMMARY]
    assert everything[0][2:] == [*(figure_title(figure.name) for figure in FIGURES), "KL, nats per token"]
    assert [tuple(row[:2]) for row in changes[1:]] == [
        (system, runtime) for runtime in RUNTIMES for system in SYSTEMS[1:]
    ]


def test_every_share_has_an_interval_around_it_that_has_a_width(results: str) -> None:
    _, everything, changes = tables(results)
    for row in (*everything[1:], *changes[1:]):
        for cell in row[2 : 2 + len(FIGURES)]:
            found = CELL.match(cell)
            assert found, cell
            value, low, high = (float(found[number]) for number in (1, 2, 3))
            assert low <= value <= high
            assert low < high


def test_the_readme_shows_the_rows_of_the_page(results: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.partition(README_START)[2].partition(README_END)[0]
    assert tables(between) == [tables(results)[0]]


def test_steering_refuses_where_random_directions_do_not_and_engines_say_what_eager_says(
    results: str,
) -> None:
    rows = {(row[0], row[1]): row for row in tables(results)[0][1:]}
    for runtime in RUNTIMES:
        success = {system: float(rows[system, runtime][2].split()[0]) for system in SYSTEMS}
        assert success["with ablation"] == success["refusal vector alone"] == 0.0
        assert min(success["undefended"], success["random, with ablation"]) > 0.9
    for system in SYSTEMS:
        assert rows[system, "eager"][2:] == rows[system, "onnxruntime-cpu"][2:]
        assert f"eager and engine, {system}: " in results


def test_the_page_says_what_made_it_and_where_and_shows_its_picture(results: str) -> None:
    assert "`make results` (`python benchmarks/results.py`)" in results
    assert re.search(r"on .+, \d+ cores; torch \S+, transformers \S+, onnxruntime", results)
    assert "](results.svg)" in results
    assert "prefers-color-scheme: dark" in (ROOT / "docs" / "results.svg").read_text(encoding="utf-8")
