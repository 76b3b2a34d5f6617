"""Pictures of blocks: well-formed, nothing clipped or overlapping, and everything that acts is in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
import torch

from calibration.errors import InputError
from calibration.plan import Positions, Site, SteeringPlan
from graph_passes.patch import patch_model
from graph_passes.selection import PromptFrom, SteeringInputs, StrengthInput
from sarsteer_export.block_picture import BlockView, draw_block
from sarsteer_export.inspection.written import block_view
from sarsteer_export.picture_colours import DARK, LIGHT
from sarsteer_export.svg import text_width
from tests import tiny_lalm
from tests.conftest import SITES, one_edit
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.foreign.cases import FOREIGN
from tests.merged import merge_with_itself

PLACES = {"last": "last positions", "all": "all positions"}
SVG = "{http://www.w3.org/2000/svg}"
VARIANTS = {
    "sequential": Variant(norm="layer"),
    "parallel": Variant(residual="parallel"),
    "parallel, one norm": Variant(residual="parallel_sum", norm="layer"),
    "sandwich": Variant(residual="sandwich", norm="rms_gemma"),
    "float16": Variant(dtype=torch.float16),
}


def steer_everywhere(model: onnx.ModelProto, *, width: int, layers: int) -> onnx.ModelProto:
    """Every operation at every site of every block and at all kinds of positions."""
    edits = [
        one_edit(op, site, positions, width=width, layers=layers, layer=layer)
        for op in ("add", "project")
        for site, positions in SITES
        for layer in range(layers)
    ]
    return patch_model(model, SteeringPlan(width, layers, edits)).model


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314 (our own picture)


def texts(picture: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text with the box (left, top, right, bottom) it takes at most."""
    found = []
    for element in parsed(picture).iter(f"{SVG}text"):
        shown = "".join([element.text or "", *(child.tail or "" for child in element)]).strip()
        size, x, y = (float(element.attrib[name]) for name in ("font-size", "x", "y"))
        width = text_width(shown, size, "mono" if "mono" in element.attrib["font-family"] else "sans")
        left = x - width / 2 if element.get("text-anchor") == "middle" else x
        found.append((shown, (left, y - 0.75 * size, left + width, y + 0.2 * size)))
    return found


def check_layout(picture: str) -> None:
    """No two texts overlap, and none leaves the picture."""
    root = parsed(picture)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes = texts(picture)
    for number, (text, (left, top, right, bottom)) in enumerate(boxes):
        assert left >= 0, text
        assert top >= 0, text
        assert right <= width, text
        assert bottom <= height, text
        for other, (left2, top2, right2, bottom2) in boxes[number + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, (text, other)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layer", [0, HAND_LAYERS - 1])
def test_all_that_acts_is_drawn_and_nothing_overlaps(name: str, layer: int, tmp_path: Path) -> None:
    _, model = hand_decoder(VARIANTS[name], tmp_path / "model.onnx")
    view = block_view(steer_everywhere(model, width=HAND_WIDTH, layers=HAND_LAYERS), "model.onnx", layer)
    picture = draw_block(view)
    check_layout(picture)
    shown = [text for text, _ in texts(picture)]
    for edit in view.edits:
        assert shown.count(edit.name) == 1
        for constant in edit.constants:
            assert any(text.startswith(f"{constant.key} ") for text in shown)
    assert shown.count("attention") == shown.count("MLP") == 2
    for site in ("block_input", "block_output", *(["final_norm_output"] if layer else [])):
        assert (shown.count(site), shown.count(f"{site} · steered")) == (1, 1)
    assert "mask last: bool [B, S, 1]" in shown
    assert "row last: int64 [B, 1, 1]" in shown
    assert "made once from attention_mask" in shown


@pytest.mark.parametrize("strength", [None, *StrengthInput])
@pytest.mark.parametrize("text", ["last", "all", "prompt", "generated", "first:20", "range:100:20000"])
def test_every_kind_of_positions_and_of_strength_is_drawn(
    text: str, strength: StrengthInput | None, tmp_path: Path
) -> None:
    _, model = hand_decoder(Variant(), tmp_path / "model.onnx")
    edits = [
        one_edit(op, Site.BLOCK_OUTPUT, Positions.parse(text), width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
        for op in ("add", "project")
    ]
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, edits)
    inputs = SteeringInputs(prompt_from=PromptFrom.INPUT, strength=strength)
    picture = draw_block(block_view(patch_model(model, plan, inputs=inputs).model, "model.onnx", None))
    check_layout(picture)
    shown = [text for text, _ in texts(picture)]
    place = PLACES.get(text, text)
    assert {f"add · {place}", f"project · {place}"} <= set(shown)
    mask = f"mask {text}, strength ≠ 0" if strength else f"mask {text}"
    assert shown.count(mask) == (0 if mask == "mask all" else 2)  # once in each edit
    numbers = {
        None: [],
        StrengthInput.BATCH: ["strength"],
        StrengthInput.EDITS: [f"strength of edit {n}" for n in (0, 1)],
    }
    for name in numbers[strength]:
        assert f"{name}: float32 [B, 1, 1]" in shown
    sources = [text for text in shown if text.startswith("made once from ")]
    assert any("steering_strength" in text for text in sources) == bool(strength)
    assert (
        any("steering_prompt_lengths" in source for source in sources)
        == edits[0].positions.needs_prompt_length
    )
    assert ("GatherND" in shown) == (text == "last")


def test_edits_in_biases_are_drawn_with_the_node_that_adds_them(tmp_path: Path) -> None:
    _, hand = hand_decoder(Variant(), tmp_path / "model.onnx")
    fused = onnx.load(FOREIGN / "genai_fp32" / "model.onnx")
    cases = [
        (hand, HAND_WIDTH, "/blocks.1/down/Add", ["Add", "bias"]),
        (fused, 32, "/model/layers.2/input_layernorm/SkipLayerNorm", ["bias"]),
    ]
    for model, width, adds, boxes in cases:
        edit = one_edit("add", Site.BLOCK_OUTPUT, Positions.ALL, width=width, layers=3, layer=1)
        steered = patch_model(model, SteeringPlan(width, 3, [edit])).model
        picture = draw_block(block_view(steered, "model.onnx", None))
        check_layout(picture)
        placed = texts(picture)
        shown = [text for text, _ in placed]
        assert shown.count(f"in the bias of {adds}") == 1
        (card,) = [rect.attrib for rect in parsed(picture).iter(f"{SVG}rect") if rect.get("class") == "edit"]
        (box,) = [box for text, box in placed if text == f"in the bias of {adds}"]
        assert box[3] <= float(card["y"]) + float(card["height"])
        assert [text for text in shown if text in ("Add", "bias", "Where")] == boxes
        assert any(text.startswith(f"vector {width} norm ") for text in shown)


def test_of_a_merged_decoder_one_body_is_drawn(tmp_path: Path) -> None:
    _, model = hand_decoder(Variant(), tmp_path / "model.onnx")
    steered = steer_everywhere(merge_with_itself(model), width=HAND_WIDTH, layers=HAND_LAYERS)
    view = block_view(steered, "merged.onnx", 0)
    assert view.name in {"merged.onnx, then_branch", "merged.onnx, else_branch"}
    flat = steer_everywhere(model, width=HAND_WIDTH, layers=HAND_LAYERS)
    assert draw_block(dataclasses.replace(view, name="x")) == draw_block(block_view(flat, "x", 0))


def test_each_exporters_graph_is_drawn(any_decoder: TinyDecoder) -> None:
    steered = steer_everywhere(any_decoder.proto, width=tiny_lalm.WIDTH, layers=tiny_lalm.LAYERS)
    for layer in range(tiny_lalm.LAYERS):
        check_layout(draw_block(block_view(steered, "decoder.onnx", layer)))


def test_a_block_without_edits_is_drawn_once_and_says_so(exported_decoder: TinyDecoder) -> None:
    view = block_view(exported_decoder.proto, "decoder.onnx", None)
    assert view.layer == 0
    shown = [text for text, _ in texts(draw_block(view))]
    assert "not steered: no edit acts here" in shown
    assert shown.count("block_output") == shown.count("attention") == 1
    assert not any("sarsteer" in text for text in shown)


def test_the_first_steered_block_is_drawn_unless_another_is_named(exported_decoder: TinyDecoder) -> None:
    edit = one_edit("add", Site.BLOCK_OUTPUT, Positions.LAST, width=tiny_lalm.WIDTH, layers=3, layer=1)
    steered = patch_model(exported_decoder.proto, SteeringPlan(tiny_lalm.WIDTH, 3, [edit])).model
    assert block_view(steered, "x", None).layer == 1
    assert block_view(steered, "x", 2).edits == ()
    for layer in (-1, 3):
        with pytest.raises(InputError, match=f"--block is {layer}; the decoder has blocks 0 to 2"):
            block_view(steered, "x", layer)


@pytest.fixture
def view(exported_decoder: TinyDecoder) -> BlockView:
    steered = steer_everywhere(exported_decoder.proto, width=tiny_lalm.WIDTH, layers=tiny_lalm.LAYERS)
    return block_view(steered, "decoder.onnx", 2)


def test_long_and_impossible_names_stay_in_the_picture(view: BlockView) -> None:
    name = "/model/" + "a_very_long_scope/" * 20 + "<&>\x00\ud800"
    long = dataclasses.replace(
        view,
        name=name,
        entry=dataclasses.replace(view.entry, tensor=name),
        exit=dataclasses.replace(view.exit, tensor=name),
        sums=tuple(dataclasses.replace(total, name=name) for total in view.sums),
    )
    picture = draw_block(long)
    picture.encode("utf-8")
    check_layout(picture)


def test_a_block_whose_wiring_is_not_understood_still_shows_its_sites(view: BlockView) -> None:
    picture = draw_block(dataclasses.replace(view, sums=()))
    check_layout(picture)
    assert [text for text, _ in texts(picture)].count("its wiring was not understood") == 2


def test_every_class_has_its_colours_for_light_and_for_dark(view: BlockView) -> None:
    used = {name for element in parsed(draw_block(view)).iter() for name in element.get("class", "").split()}
    assert used - {"head"} <= set(LIGHT)
    assert set(LIGHT) == set(DARK)
