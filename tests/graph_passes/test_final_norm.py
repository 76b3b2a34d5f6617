"""Where the final norm ends, in graphs with a head, without one, and with a quantised one."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from calibration.errors import SiteNotFoundError
from calibration.plan import Site
from graph_passes.residual_stream import find_residual_stream
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder


def test_logits_selected_before_the_norm_leave_no_site_over_every_position(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(head="last_first"), tmp_path / "model.onnx")
    stream = find_residual_stream(proto)
    assert stream.final_norm_output is None
    with pytest.raises(SiteNotFoundError, match="no final norm over every position"):
        stream.tensor(Site.FINAL_NORM_OUTPUT, HAND_LAYERS - 1)
    assert stream.tensor(Site.BLOCK_OUTPUT, HAND_LAYERS - 1) == stream.blocks[-1].output


def test_a_graph_without_a_head_ends_at_its_final_norm(tmp_path: Path) -> None:
    """As decoders do whose head is a graph of its own; a graph that ends before the norm has no such site."""
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    stream = find_residual_stream(proto)
    logits = proto.graph.output[0]
    for output, expected in (
        (stream.final_norm_output, stream.final_norm_output),
        (stream.blocks[-1].output, None),
    ):
        logits.CopyFrom(helper.make_tensor_value_info(str(output), TensorProto.FLOAT, None))
        assert find_residual_stream(proto).final_norm_output == expected
        assert find_residual_stream(proto).blocks == stream.blocks


def test_the_norm_of_a_dynamically_quantised_head_is_a_float_tensor(tmp_path: Path) -> None:
    """`MatMulInteger` reads integers; an edit of those would be no steering."""
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    norm = str(find_residual_stream(proto).final_norm_output)
    head = next(node for node in proto.graph.node if norm in node.input)
    weight = helper.make_tensor("head.q", TensorProto.UINT8, [HAND_WIDTH, 3], [1] * (3 * HAND_WIDTH))
    proto.graph.initializer.append(weight)
    at = list(proto.graph.node).index(head)
    del proto.graph.node[at:]
    proto.graph.node.extend(
        [
            helper.make_node("DynamicQuantizeLinear", [norm], ["norm.q", "norm.scale", "norm.zero"]),
            helper.make_node("MatMulInteger", ["norm.q", "head.q", "norm.zero"], ["product"]),
            helper.make_node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["norm.scale", "wide"], ["logits"]),
        ]
    )
    assert find_residual_stream(proto).final_norm_output == norm
