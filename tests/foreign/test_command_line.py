"""`patch` and `unpatch` of foreign decoders, as a user types them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.foreign.cases import CASES, ForeignGraph
from tests.foreign.catalogue import mixed_plan
from tests.sarsteer_export.command_line import answered, refused, sarsteer

KINDS = ("optimum_merged", "transformers_lalm", "functions_nested", "qdq_static", "dynamic")


@pytest.mark.parametrize(
    "foreign",
    [case for case in CASES if case.name in KINDS],
    ids=lambda case: case.name,
    indirect=True,
)
def test_a_foreign_decoder_is_patched_and_unpatched(foreign: ForeignGraph, tmp_path: Path) -> None:
    plan, steered, original = (tmp_path / name for name in ("plan.safetensors", "s.onnx", "o.onnx"))
    mixed_plan(foreign).save(plan)
    answered(sarsteer("patch", foreign.decode_path, "--plan", plan, "-o", steered))
    before, after = onnx.load(foreign.decode_path), onnx.load(steered)
    assert (after.opset_import, after.ir_version) == (before.opset_import, before.ir_version)
    assert list(after.functions) == list(before.functions)
    answered(sarsteer("unpatch", steered, "-o", original))
    assert onnx.load(original) == before


@pytest.mark.parametrize(
    "foreign",
    [case for case in CASES if case.name == "transformers_lalm"],
    ids=lambda case: case.name,
    indirect=True,
)
def test_a_head_alone_has_no_site_and_the_message_says_what_to_do(
    foreign: ForeignGraph, tmp_path: Path
) -> None:
    plan, steered = tmp_path / "plan.safetensors", tmp_path / "steered.onnx"
    mixed_plan(foreign).save(plan)
    head = foreign.folder / str(foreign.case.head)
    words = ("no residual add", "nearest candidates", "inspect --sites FILE")
    refused(sarsteer("patch", head, "--plan", plan, "-o", steered), *words, code=4)
    assert not steered.exists()
