"""What `evaluate -o` leaves: results.json, results.md, results.svg and outputs.jsonl, all of them or none."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sarsteer_export.evaluation.plots import evaluation_svg, picture_title
from sarsteer_export.evaluation.report import agreement_lines
from sarsteer_export.staging import OUTPUTS, RESULTS_JSON, RESULTS_MARKDOWN, RESULTS_PICTURE, staged_directory

if TYPE_CHECKING:
    from pathlib import Path

    from sarsteer_export.evaluation.report import Evaluation


def write_results(found: Evaluation, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the folder. Raises `InputError` when it exists and may not be replaced, or holds other files."""
    with staged_directory(folder, overwrite=overwrite) as staged:
        content = json.dumps(finite(found.to_json()), indent=2, allow_nan=False)
        (staged / RESULTS_JSON).write_text(content + "\n", encoding="utf-8")
        (staged / RESULTS_MARKDOWN).write_text(results_page(found), encoding="utf-8")
        (staged / RESULTS_PICTURE).write_text(evaluation_svg(found.rows), encoding="utf-8")
        with (staged / OUTPUTS).open("w", encoding="utf-8") as opened:
            opened.writelines(json.dumps(asdict(record)) + "\n" for record in found.outputs)


def results_page(found: Evaluation) -> str:
    """The results as a Markdown page."""
    parts = [
        "# Results",
        found.markdown(),
        f"![{picture_title(found.rows)}]({RESULTS_PICTURE})",
    ]
    if found.agreements:
        parts.append("\n".join(f"- {line}" for line in agreement_lines(found.agreements)))
    if found.notes:
        parts.append("\n".join(f"- {note}" for note in found.notes))
    return "\n\n".join(parts) + "\n"


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has not: a divergence may be infinite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
