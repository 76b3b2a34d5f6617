"""docs/results.md, and the table that the README shows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from machine import cores, cpu_name
from sarsteer_export.evaluation.figures import KL
from sarsteer_export.evaluation.report import agreement_lines, difference_rows, markdown_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.directions import SteeringSettings
    from sarsteer_export.evaluation.report import Evaluation, Row

SUMMARY = ("attack_success", "refused", "harmful_degenerate", "benign_answered", KL)
"""The figures that the README shows."""
README_START, README_END = "<!-- results: make results writes this table -->", "<!-- end of results -->"
MAIN_PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime")


def summary(rows: Sequence[Row]) -> list[str]:
    """The lines of the README's table."""
    return markdown_rows(rows, SUMMARY)


def page(found: Evaluation, steering: SteeringSettings) -> str:
    """The whole page."""
    about = found.about
    counts = [about["requests"][kind]["count"] for kind in ("harmful", "benign")]
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in MAIN_PACKAGES if about["versions"].get(name)
    )
    parts = [
        "# Results",
        f"`make results` (`python benchmarks/results.py`) wrote this page, on {cpu_name()}, {len(cores())} cores; "
        f"{versions}. [evaluate.md](evaluate.md) says what every figure means.",
        f"The [pocket LALM](../examples/pocket_lalm/README.md) on its held-out test clips, {counts[0]} harmful and "
        f"{counts[1]} benign ones, in voices that calibration did not hear. Both plans: α {steering.alpha:g}, every "
        f"block; with ablation: k {steering.rank}, λ {steering.ablation:g}. Judged by strings: a refusal holds one of "
        f"{about['judge']['phrases']} phrases, an answer matches `{about['judge']['answer_pattern']}`, all else is "
        "degenerate.",
        "\n".join(summary(found.rows)),
        "![Attack success, benign answers and damage of every system](results.svg)",
        "## Everything",
        "\n".join(markdown_rows(found.rows)),
        "## What changes, prompt by prompt",
        "Each share less that of the undefended model on the same prompts, with paired intervals.",
        "\n".join(difference_rows(found.rows)),
        "## Whether eager and engine agree",
        "\n".join(f"- {line}" for line in agreement_lines(found.agreements)),
        "## Notes",
        "\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in found.notes),
        "- The pocket LALM is a toy that knows two replies: it proves the machinery, not the method. Shares of exactly "
        "0 and 1 are what it is made for; its card says how.",
    ]
    return "\n\n".join(parts).replace("\n\n- The pocket", "\n- The pocket") + "\n"
