"""The attention mask is found by what is computed from it; its name decides only where structure does not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes.graph_index import subgraphs
from graph_passes.residual_stream import find_residual_stream
from tests.decoders import TinyDecoder, Variant, hand_decoder


def renamed(proto: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """A copy whose graph inputs have other names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in copy.graph.input:
        value.name = names.get(value.name, value.name)
    _rename_reads(copy.graph, names)
    return copy


def _rename_reads(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for body in subgraphs(node):
            _rename_reads(body, names)


def without_names(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy whose inputs are numbered, and what each one was."""
    names = {value.name: f"input{number}" for number, value in enumerate(proto.graph.input)}
    return renamed(proto, names), {new: old for old, new in names.items()}


def with_second_mask(folder: Path) -> onnx.ModelProto:
    """A decoder that takes what is attended to from the product of two inputs."""
    _, proto = hand_decoder(Variant(), folder / "model.onnx")
    _rename_reads(proto.graph, {"attention_mask": "both"})
    proto.graph.input.append(helper.make_tensor_value_info("other_mask", TensorProto.INT64, ["b", "t"]))
    proto.graph.node.insert(0, helper.make_node("Mul", ["attention_mask", "other_mask"], ["both"]))
    return proto


def test_the_mask_is_found_without_its_name(any_decoder: TinyDecoder) -> None:
    """Position ids are of the same rank and type and come into attention too: as angles."""
    proto, was = without_names(any_decoder.proto)
    found = find_residual_stream(proto).attention_mask
    assert found is not None
    assert was[found] == "attention_mask"


def test_tokens_are_no_mask(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(tokens=True, mask=False, norm="layer"), tmp_path / "model.onnx")
    assert find_residual_stream(proto).attention_mask is None


def test_tokens_that_a_mask_is_computed_from_are_no_mask(tmp_path: Path) -> None:
    """Which tokens are padding tells nothing of the past: a decode step is not fed its tokens."""
    _, proto = hand_decoder(Variant(tokens=True, norm="layer"), tmp_path / "model.onnx")
    proto.graph.input.remove(next(value for value in proto.graph.input if value.name == "attention_mask"))
    is_token = helper.make_node("Cast", ["input_ids"], ["attention_mask"], to=TensorProto.BOOL)
    proto.graph.node.insert(0, is_token)
    assert find_residual_stream(proto).attention_mask is None


@pytest.mark.parametrize("name", ["input.attention_mask", "decoder.attention_mask", "padding"])
def test_a_mask_of_another_name_is_found_beside_an_unrelated_one(name: str, tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    proto = renamed(proto, {"attention_mask": name})
    unread = helper.make_tensor_value_info("feature_attention_mask", TensorProto.INT64, ["b", "f"])
    proto.graph.input.append(unread)
    assert find_residual_stream(proto).attention_mask == name


def test_its_name_decides_between_two(tmp_path: Path) -> None:
    proto = with_second_mask(tmp_path)
    assert find_residual_stream(proto).attention_mask == "attention_mask"
    assert find_residual_stream(renamed(proto, {"attention_mask": "a_mask"})).attention_mask is None


def test_a_mask_that_nothing_reads_still_says_what_is_attended_to(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(mask=False), tmp_path / "model.onnx")
    value = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "t"])
    proto.graph.input.append(value)
    assert find_residual_stream(proto).attention_mask == "attention_mask"
    value.name = "feature_attention_mask"
    proto.graph.input[-1].CopyFrom(value)
    assert find_residual_stream(proto).attention_mask is None
