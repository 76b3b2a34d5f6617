"""Every supported family, run: the table of `docs/models.md`.

`python -m tests.zoo.catalogue`, from the repository root, builds a bundle of each family's tiny checkpoint and writes
the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from calibration.not_supported import NOT_SUPPORTED
from sarsteer_export.bundle.manifest import ENCODER, TORCH_FREE
from tests.zoo.end_to_end import Built, build
from tests.zoo.families import FAMILIES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEADER = (
    "family",
    "class",
    "blocks",
    "audio encoder, projector",
    "audio stands at",
    "position axes",
    "calibrated on",
    "decoder",
    "audio encoder exported",
    "inputs made by",
    "edits patched",
    "parity",
    "controls caught",
    "prompts and answers",
)


def row(built: Built) -> str:
    """The line of a family: what was found in its model and its bundle, and what was said of them."""
    adapter, manifest = built.lalm.adapter, built.manifest
    audio = adapter.audio_parts
    parts = (
        [] if audio is None else [audio.encoder, *([audio.projector] if audio.projector is not None else [])]
    )
    said = built.plan.provenance
    caches = [port for port in _inputs(built, "decoder") if port.startswith("past_key_values.")]
    extra = [port for port in _inputs(built, "decoder") if port == "per_layer_inputs"]
    decoder = f"{len(caches)} caches" + "".join(f", `{name}`" for name in extra)
    caught = built.controls
    return _line(
        built.family.name,
        f"`{manifest.model['class']}`",
        len(adapter.parts.blocks),
        ", ".join(f"`{type(part).__name__}`" for part in parts) or "hears nothing",
        "–" if adapter.audio_token is None else f"`{adapter.audio_token}`",
        adapter.parts.position_axes,
        f"{said['harmful']['count']} + {said['benign']['count']} {'clips' if built.lalm.hears else 'texts'}",
        decoder,
        _encoder(built),
        "this package, without torch" if manifest.frontend == TORCH_FREE else "its own processor",
        f"{len(manifest.edits)} of {len(built.plan.edits)}",
        f"{built.parity['verdict']}: {', '.join(case['case'] for case in built.parity['cases'])}",
        f"{sum(caught.values())} of {len(caught)}",
        _answers(built),
    )


def _encoder(built: Built) -> str:
    if (reason := built.manifest.missing.get(ENCODER)) is not None:
        return f"no: {reason}"
    return ", ".join(f"`{name}`" for name in _inputs(built, ENCODER)) or "–"


def _inputs(built: Built, component: str) -> list[str]:
    file = built.manifest.components.get(component)
    ports = [] if file is None else built.manifest.graphs[file.as_posix()]["inputs"]
    return [port["name"] for port in ports]


def _answers(built: Built) -> str:
    """Whether what comes before the decoder, and whole answers, were compared, and whether they are equal."""
    figures = built.parity["components"]
    if not figures:
        return "not compared"
    equal = all(figure["passed"] for figure in figures)
    notes = built.parity["notes"]
    assert notes, f"{built.family.name}: no answer was compared"
    same = all(
        f"{count} of {count} word" in note for note in notes for count in [note.split(": ")[1].split()[0]]
    )
    return f"prompts {'equal' if equal else 'differ'}, answers {'equal' if same else 'differ'}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(rows: Sequence[str]) -> str:
    """The table between its marks, and the families that are refused."""
    lines = [
        BEGIN,
        _line(*HEADER),
        _line(*("---" for _ in HEADER)),
        *rows,
        "",
        "Refused, with the reason:",
        "",
    ]
    lines += [
        f"- {family.name} (`{'`, `'.join(family.model_types)}`): {family.reason}." for family in NOT_SUPPORTED
    ]
    return "\n".join([*lines, END])


def main() -> None:
    """Build every family and write the table."""
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as made:
            rows.append(row(build(family, family.save(Path(made) / "checkpoint"), Path(made))))
        print(rows[-1])
    document = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = document.partition(BEGIN)
    DOCUMENT.write_text(before + table(rows) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
