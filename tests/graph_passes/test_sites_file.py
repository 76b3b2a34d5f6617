"""Sites by hand: the file, what is refused, and the candidates of a graph whose stream is not found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from calibration.errors import InputError, SiteNotFoundError, UnsupportedError
from calibration.plan import Positions, Site
from graph_passes.named_sites import check_sites, sites_skeleton
from graph_passes.patch import patch_model
from graph_passes.residual_stream import ResidualStream, find_residual_stream
from graph_passes.sites_file import read_sites, sites_content, write_sites
from tests import tiny_lalm
from tests.conftest import one_edit, plan_of
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.disguised import disguise_residual_adds
from tests.merged import merge_with_itself

MISSING = object()


def without_adds(stream: ResidualStream) -> ResidualStream:
    """What a file can say of a stream: not which nodes add."""
    blocks = tuple(type(block)(block.index, block.input, block.output, ()) for block in stream.blocks)
    return ResidualStream(**{**vars(stream), "blocks": blocks})


def test_what_is_written_is_read_and_fits_the_graph(any_decoder: TinyDecoder, tmp_path: Path) -> None:
    stream = find_residual_stream(any_decoder.proto)
    write_sites(sites_content(stream), tmp_path / "sites.json")
    found = read_sites(tmp_path / "sites.json")
    assert found == without_adds(stream)
    check_sites(any_decoder.proto, found)


def test_the_sites_of_a_steered_graph_are_those_of_the_unsteered_one(exported_decoder: TinyDecoder) -> None:
    edit = one_edit("add", Site.BLOCK_INPUT, Positions.LAST, width=tiny_lalm.WIDTH, layers=3, layer=0)
    steered = patch_model(exported_decoder.proto, plan_of(edit)).model
    unsteered = find_residual_stream(exported_decoder.proto)
    assert sites_content(find_residual_stream(steered)) == sites_content(unsteered)


def test_a_given_stream_is_that_of_one_graph(tmp_path: Path) -> None:
    _, model = hand_decoder(Variant(), tmp_path / "model.onnx")
    stream, merged = find_residual_stream(model), merge_with_itself(model)
    edit = one_edit("add", Site.BLOCK_INPUT, Positions.LAST, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
    plan = plan_of(edit, width=HAND_WIDTH, layers=HAND_LAYERS)
    assert len(patch_model(merged, plan).edits) == 2  # one in each body, when none is given
    with pytest.raises(
        UnsupportedError, match=r"merged decoder of 2 bodies .*then_branch.* leave out --sites"
    ):
        patch_model(merged, plan, stream=stream)
    assert len(patch_model(model, plan, stream=stream).edits) == 1


@pytest.fixture(scope="module")
def content(exported_decoder: TinyDecoder) -> dict[str, Any]:
    return sites_content(find_residual_stream(exported_decoder.proto))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format", "sarsteer-plan", "format is not 'sarsteer-sites'"),
        ("version", 2, "version is 2; expected 1"),
        ("version", True, "version is True"),
        ("hidden_size", MISSING, "hidden_size is missing"),
        ("hidden_size", "64", 'hidden_size is "64"; expected an integer'),
        ("hidden_size", 0, "hidden_size is 0"),
        ("hidden_size", True, "hidden_size is true"),
        ("element_type", "FLOAT", 'element_type is "FLOAT"; expected one of float32'),
        ("element_type", None, "element_type is null"),
        ("attention_mask", 3, "attention_mask is 3; expected the name of a tensor or null"),
        ("attention_mask", "", 'attention_mask is ""'),
        ("final_norm_output", [], "final_norm_output is []"),
        ("blocks", [], "blocks is []; expected a list"),
        ("blocks", "add", 'blocks is "add"'),
        ("blocks", [3], "blocks.0 is 3"),
        ("blocks", [{"input": "x"}], "blocks.0.output is missing"),
        (
            "blocks",
            [{"input": None, "output": "y"}],
            "blocks.0.input is null; expected the name of a tensor; complete",
        ),
        ("blocks", [{"input": "x", "output": "y", "adds": []}], "blocks.0.adds is unknown"),
        ("other_types", [], "other_types is []"),
        ("other_types", {"x": "int8"}, 'other_types.x is "int8"'),
        ("width", 64, "width is unknown"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    content: dict[str, Any], tmp_path: Path, field: str, value: Any, words: str
) -> None:
    changed = {**content, field: value}
    if value is MISSING:
        del changed[field]
    path = tmp_path / "sites.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_sites(path)
    assert str(caught.value).startswith(f"sites file {path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[" * 100000, "[]", "null"])
def test_a_file_that_is_no_sites_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sites.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="sites file"):
        read_sites(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_sites(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["blocks"][1].update(output="nowhere"),
            "blocks.1.output is 'nowhere', which the graph does not",
        ),
        (lambda c: c.update(final_norm_output="nowhere"), "final_norm_output is 'nowhere'"),
        (lambda c: c.update(hidden_size=65), "of width 64; hidden_size says 65"),
        (lambda c: c.update(element_type="float16"), "of type float32; the file says float16"),
        (lambda c: c["blocks"][0].update(input="attention_mask"), "expected [batch, sequence, width]"),
        (lambda c: c["blocks"][0].update(input="position_ids"), "blocks.0.input is 'position_ids' of shape"),
        (lambda c: c.update(blocks=c["blocks"][::-1]), "which does not depend on"),
        (
            lambda c: c["blocks"][0].update(output=c["blocks"][0]["input"]),
            "which does not depend on blocks.0.input",
        ),
        (lambda c: c.update(other_types={"logits": "float16"}), "other_types names 'logits'"),
        (lambda c: c.update(attention_mask="mask"), "attention_mask is 'mask', which is no input"),
        (lambda c: c.update(attention_mask="inputs_embeds"), "attention_mask is 'inputs_embeds' of shape"),
    ],
)
def test_sites_that_the_graph_has_not_are_refused(
    exported_decoder: TinyDecoder, content: dict[str, Any], tmp_path: Path, change: Any, words: str
) -> None:
    changed = json.loads(json.dumps(content))
    change(changed)
    write_sites(changed, tmp_path / "sites.json")
    with pytest.raises(InputError) as caught:
        check_sites(exported_decoder.proto, read_sites(tmp_path / "sites.json"))
    assert words in str(caught.value)


@pytest.mark.parametrize("residual", ["sequential", "parallel", "sandwich"])
def test_the_candidates_of_a_disguised_graph_are_its_residual_sums(residual: str, tmp_path: Path) -> None:
    _, model = hand_decoder(Variant(residual=residual), tmp_path / "model.onnx")
    stream, disguised = find_residual_stream(model), disguise_residual_adds(model)
    with pytest.raises(SiteNotFoundError):
        find_residual_stream(disguised)
    skeleton = sites_skeleton(disguised, "why")
    sums = [name for block in stream.blocks for name in adds_of(model, block.adds)]
    assert [candidate["tensor"] for candidate in skeleton["candidates"]] == sums
    assert all(candidate["node"].startswith("Concat ") for candidate in skeleton["candidates"])
    assert (skeleton["hidden_size"], skeleton["element_type"]) == (stream.hidden_size, "float32")
    assert skeleton["attention_mask"] == "attention_mask"
    assert skeleton["problem"] == "why"
    write_sites(skeleton, tmp_path / "sites.json")
    with pytest.raises(InputError, match=r"blocks.0.input is null"):
        read_sites(tmp_path / "sites.json")


def test_the_candidates_of_any_graph_are_its_residual_sums(standard_decoder: TinyDecoder) -> None:
    """A graph that is found and one that is not have the same ones, and norms are none of them."""
    model = standard_decoder.proto
    stream = find_residual_stream(model)
    sums = [name for block in stream.blocks for name in adds_of(model, block.adds)]
    for graph in (model, disguise_residual_adds(model)):
        assert [candidate["tensor"] for candidate in sites_skeleton(graph, "why")["candidates"]] == sums


def test_the_candidates_of_a_fused_graph_are_the_sums_in_its_norms(fused_decoder: TinyDecoder) -> None:
    candidates = [entry["tensor"] for entry in sites_skeleton(fused_decoder.proto, "why")["candidates"]]
    outputs = [block.output for block in find_residual_stream(fused_decoder.proto).blocks]
    assert candidates[1::2] == outputs
    assert len(candidates) == 2 * len(outputs)


def adds_of(model: onnx.ModelProto, described: tuple[str, ...]) -> list[str]:
    return [node.output[0] for node in model.graph.node if f"{node.op_type} {node.name!r}" in described]


def test_a_stream_of_two_types_is_told(tmp_path: Path, content: dict[str, Any]) -> None:
    first = content["blocks"][0]["input"]
    write_sites(
        {**content, "element_type": "float16", "other_types": {first: "float32"}}, tmp_path / "sites.json"
    )
    found = read_sites(tmp_path / "sites.json")
    assert found.elem_type == TensorProto.FLOAT16
    assert found.elem_type_of(first) == TensorProto.FLOAT
