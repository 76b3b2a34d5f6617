"""Expose stream tensors as extra graph outputs, to compare them block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import ModelProto, helper

from graph_passes.fused_norms import split_fused_norms

if TYPE_CHECKING:
    from graph_passes.residual_stream import ResidualStream


def expose_block_outputs(model: ModelProto, stream: ResidualStream) -> ModelProto:
    """A copy of `model` whose outputs also hold every block's output (B, S, D), after its edits.

    The extra outputs bear the names of the stream tensors, `stream.blocks[i].output`.
    """
    produced = {name for node in model.graph.node for name in node.output}
    hidden = {block.output for block in stream.blocks} - produced
    probed = ModelProto()
    probed.CopyFrom(split_fused_norms(model, hidden))
    present = {value.name for value in model.graph.output}
    for block in stream.blocks:
        if block.output not in present:
            dims: list[str | int | None] = ["batch", "sequence", stream.hidden_size]
            probed.graph.output.append(helper.make_tensor_value_info(block.output, stream.elem_type, dims))
    return probed
