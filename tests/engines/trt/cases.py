"""What engines are fed with in these tests: the tiny decoder's interface, profiles and a script of steps."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from onnx.external_data_helper import load_external_data_for_model

from calibration.plan import Add, Positions, Project, SteeringPlan
from engines.sidecar import Binding, Profile, ShapeRange
from engines.trace import Script
from graph_passes.patch import patch_model
from tests import tiny_lalm
from tests.conftest import plan_of, random_basis, random_vector
from tests.decoders import HEAD_WIDTH, KV_HEADS, TinyDecoder

PREFILL, STEPS = 5, 4
"""Positions of the prefill, and decode steps after it."""
PLAN: SteeringPlan = plan_of(
    *(Add(layer, random_vector(tiny_lalm.WIDTH, seed=layer), strength=0.7) for layer in range(2)),
    Project(2, random_basis(tiny_lalm.WIDTH, 4, seed=9), strength=1.2, positions=Positions.ALL),
)


def whole(decoder: TinyDecoder, plan: SteeringPlan | None = None) -> onnx.ModelProto:
    """The decoder, steered by a plan if there is one, with its weights in memory."""
    model = onnx.ModelProto()
    model.CopyFrom(decoder.proto if plan is None else patch_model(decoder.proto, plan).model)
    load_external_data_for_model(model, str(decoder.path.parent))
    return model


def bindings(values: list[onnx.ValueInfoProto]) -> tuple[Binding, ...]:
    """Inputs or outputs of a graph as a sidecar has them."""
    return tuple(
        Binding(
            value.name,
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def decoder_profile(
    name: str, sequence: tuple[int, int], past: tuple[int, int], batch: tuple[int, int] = (1, 4)
) -> Profile:
    """A profile of the tiny decoder from the least and the most of sequence, past and batch."""

    def shapes(B: int, S: int, P: int) -> dict[str, tuple[int, ...]]:
        cache = {
            f"past_key_values.{layer}.{kind}": (B, KV_HEADS, P, HEAD_WIDTH)
            for layer in range(tiny_lalm.LAYERS)
            for kind in ("key", "value")
        }
        named = {
            "inputs_embeds": (B, S, tiny_lalm.WIDTH),
            "attention_mask": (B, P + S),
            "position_ids": (B, S),
        }
        return named | cache

    low, high = (shapes(batch[end], sequence[end], past[end]) for end in (0, 1))
    return Profile(name, {key: ShapeRange(low[key], high[key], high[key]) for key in low})


ONE_PROFILE = (decoder_profile("all", (1, 8), (0, 16)),)
TWO_PROFILES = (decoder_profile("prefill", (1, 8), (0, 0)), decoder_profile("decode", (1, 1), (1, 8)))


def script(*, batch: int = 3, seed: int = 0) -> Script:
    """A prefill of rows padded on the left by 0, 1, … positions and the decode steps after it, random throughout."""
    random = np.random.default_rng(seed)
    mask_BT = np.ones((batch, PREFILL), np.int64)
    for row in range(batch):
        mask_BT[row, :row] = 0
    steps = []
    sequences = (PREFILL, *[1] * STEPS)
    for number, sequence in enumerate(sequences):
        if number:
            mask_BT = np.concatenate([mask_BT, np.ones((batch, 1), np.int64)], axis=1)
        positions_BT = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
        steps.append(
            {
                "inputs_embeds": random.standard_normal((batch, sequence, tiny_lalm.WIDTH)).astype(
                    np.float32
                ),
                "attention_mask": mask_BT,
                "position_ids": positions_BT[:, -sequence:],
            }
        )
    return Script("tiny", tuple(steps), sequences)
