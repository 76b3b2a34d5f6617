"""`inspect` of foreign decoder graphs: every table is whole where the stream is found, and every block is drawn."""

from __future__ import annotations

import json
from pathlib import Path

from graph_passes.onnx_file import external_files, read_graph
from graph_passes.patch import patch_model
from graph_passes.refit import refit_model
from sarsteer_export.block_picture import draw_block
from sarsteer_export.inspection.written import block_view
from tests.foreign.cases import ForeignGraph
from tests.foreign.catalogue import plans
from tests.sarsteer_export.command_line import answered_json, refused, sarsteer
from tests.sarsteer_export.test_block_picture import check_layout, texts


def test_every_foreign_graph_is_shown_or_why_not_is_said(foreign: ForeignGraph, tmp_path: Path) -> None:
    for name in foreign.case.files:
        path, sites = foreign.folder / name, tmp_path / f"{name}.json"
        found = answered_json(sarsteer("inspect", path, "--json"))
        if foreign.case.name == "optimum_merged":
            refused(sarsteer("inspect", path, "--sites", sites), "merged decoder of 2 bodies", code=3)
        else:
            answered_json(sarsteer("inspect", path, "--sites", sites, "--json"))
            content = json.loads(sites.read_text(encoding="utf-8"))
            assert ("problem" in content) == (found["stream"] is None)
        if found["stream"] is None:
            continue
        layers = foreign.model.config.num_hidden_layers
        assert len(found["stream"]["blocks"]) == layers
        assert all(row["consumers"] for row in found["sites"])  # also where calls of functions read them
        for layer in range(layers):
            picture = draw_block(block_view(read_graph(path), name, layer))
            check_layout(picture)
            assert {"block_input", "block_output"} <= {text for text, _ in texts(picture)}


def test_every_steered_foreign_graph_is_shown_and_refitted(foreign: ForeignGraph, tmp_path: Path) -> None:
    """Edits at every site, the final norm and the biases among them; refitting with the same plan changes nothing."""
    for name in foreign.case.files:
        proto = read_graph(foreign.folder / name)
        for plan in plans(foreign).values():
            steered = patch_model(proto, plan).model
            assert refit_model(steered, plan) == steered
            path = tmp_path / "steered.onnx"
            path.write_bytes(steered.SerializeToString())
            for data in {file.location for file in external_files(proto)}:
                (tmp_path / data).write_bytes((foreign.folder / data).read_bytes())
            found = answered_json(sarsteer("inspect", path, "--json"))
            shown = [edit for row in found["sites"] for edit in row["edits"]]
            assert len(shown) == len(plan.edits)
