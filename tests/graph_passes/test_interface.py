"""What a graph says about itself: its ports, and the steering it holds."""

from __future__ import annotations

import numpy as np

from calibration.plan import Add, Positions, Project, Site
from graph_passes.interface import Port, graph_inputs, graph_outputs
from graph_passes.patch import patch_model
from graph_passes.steering_in import steering_constants
from tests import tiny_lalm
from tests.conftest import plan_of, random_basis, random_vector
from tests.decoders import TinyDecoder


def test_ports_are_named_typed_and_sized(torchscript_decoder: TinyDecoder) -> None:
    inputs = graph_inputs(torchscript_decoder.proto)
    assert len(inputs) == 3 + 2 * tiny_lalm.LAYERS
    assert inputs[0] == Port("inputs_embeds", "FLOAT", ("batch", "inputs_embeds_length", tiny_lalm.WIDTH))
    assert str(inputs[1]) == "attention_mask: int64 [batch, attention_mask_length]"
    assert [port.name for port in graph_outputs(torchscript_decoder.proto)][:2] == ["logits", "present.0.key"]


def test_an_unsteered_graph_holds_no_steering(any_decoder: TinyDecoder) -> None:
    assert steering_constants(any_decoder.proto) == ()


def test_the_steering_in_a_graph_is_read_back(any_decoder: TinyDecoder) -> None:
    vector, basis = random_vector(tiny_lalm.WIDTH, seed=0), random_basis(tiny_lalm.WIDTH, 4, seed=1)
    plan = plan_of(
        Add(1, vector, strength=-2.0), Project(0, basis, site=Site.BLOCK_INPUT, positions=Positions.ALL)
    )
    found = {one.name: one for one in steering_constants(patch_model(any_decoder.proto, plan).model)}
    assert found.keys() == {
        "sarsteer.1.block_output.add.0.vector",
        "sarsteer.0.block_input.project.0.basis",
        "sarsteer.0.block_input.project.0.basis_scaled",
    }
    one = found["sarsteer.1.block_output.add.0.vector"]
    assert (one.layer, one.site, one.op, one.elem_type) == (1, "block_output", "add", "float32")
    assert one.shape == (tiny_lalm.WIDTH,)
    np.testing.assert_allclose(one.norm, 2 * np.linalg.norm(vector.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(
        found["sarsteer.0.block_input.project.0.basis"].norm, 2, rtol=1e-6
    )  # √4 columns
