"""Block outputs as extra graph outputs, before and after patching."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from calibration.decoder_parts import find_decoder
from calibration.plan import Add, Positions
from calibration.states import recorded_block_outputs
from calibration.steered import steered
from calibration.token_positions import position_ids
from graph_passes.patch import patch_model
from graph_passes.probe import expose_block_outputs
from graph_passes.residual_stream import find_residual_stream
from tests import tiny_lalm
from tests.conftest import padded, plan_of, random_vector
from tests.decoders import TinyDecoder, no_past, run_eager, run_graph, session
from tests.graph_passes.test_residual_stream import STREAM_ATOL


def test_exposed_outputs_are_the_models_block_outputs_after_their_edits(any_decoder: TinyDecoder) -> None:
    plan = plan_of(Add(1, random_vector(tiny_lalm.WIDTH, seed=0), positions=Positions.ALL))
    result = patch_model(any_decoder.proto, plan)
    probed = expose_block_outputs(result.model, result.stream)
    mask = padded("none")
    embeds = torch.randn(*mask.shape, tiny_lalm.WIDTH, generator=torch.Generator().manual_seed(1))
    arguments = (embeds, mask, position_ids(mask), no_past(len(mask)))
    got = run_graph(session(probed, any_decoder.path.parent), *arguments)
    with steered(any_decoder.model, plan), recorded_block_outputs(find_decoder(any_decoder.model)) as outputs:
        run_eager(any_decoder.model, *arguments)
    for block, expected in zip(result.stream.blocks, outputs, strict=True):
        np.testing.assert_allclose(got[block.output], expected, rtol=0, atol=STREAM_ATOL)


def test_only_outputs_are_added_and_the_model_is_left_alone(exported_decoder: TinyDecoder) -> None:
    proto = exported_decoder.proto
    stream = find_residual_stream(proto)
    before = [value.name for value in proto.graph.output]
    probed = expose_block_outputs(proto, stream)
    assert [value.name for value in proto.graph.output] == before
    assert [value.name for value in probed.graph.output] == before + [block.output for block in stream.blocks]
    assert list(probed.graph.node) == list(proto.graph.node)
    again = expose_block_outputs(probed, stream)
    assert list(again.graph.output) == list(probed.graph.output)


def test_the_stream_is_found_again_in_a_steered_graph(any_decoder: TinyDecoder) -> None:
    """A steered tensor keeps its name, so that a steered graph is inspected as the unsteered one is."""
    vector = random_vector(tiny_lalm.WIDTH, seed=0)
    plan = plan_of(*(Add(layer, vector) for layer in range(tiny_lalm.LAYERS)))
    result = patch_model(any_decoder.proto, plan)
    again = find_residual_stream(result.model)
    assert again == result.stream


def test_a_probed_graph_passes_onnxs_own_checker(dynamo_decoder: TinyDecoder) -> None:
    probed = expose_block_outputs(dynamo_decoder.proto, find_residual_stream(dynamo_decoder.proto))
    onnx.checker.check_model(probed, full_check=True)
