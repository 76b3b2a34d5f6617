"""The guard: what calibration measured against what a graph can hold and square."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from calibration.calibrate import CalibrationSettings, calibrate
from calibration.directions import SteeringSettings
from calibration.errors import InputError
from calibration.lalm import Lalm
from calibration.plan import Add, SteeringPlan
from graph_passes.norm_precision import norm_precisions
from graph_passes.onnx_file import read_graph
from graph_passes.patch import patch_model
from graph_passes.residual_stream import find_residual_stream
from sarsteer_export.exporting.export import export_decoder
from sarsteer_export.range_guard import StreamMagnitudes, check_range, plan_magnitudes
from tests import tiny_lalm
from tests.conftest import random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, TinyDecoder, Variant, hand_decoder
from tests.graph_passes.test_norm_precision import narrow_decoder

HALF_LIMIT = math.sqrt(65504)


@pytest.fixture(scope="module")
def written_out(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A float16 decoder whose norms square in float16."""
    variant = Variant(dtype=torch.float16, norm="layer")
    return narrow_decoder(variant, tmp_path_factory.mktemp("half") / "model.onnx")


@pytest.fixture(scope="module")
def widening(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A float16 decoder whose norms square in float32."""
    return hand_decoder(Variant(dtype=torch.float16), tmp_path_factory.mktemp("wide") / "model.onnx")[1]


def plan_with(entry: Any, *, layers: int = HAND_LAYERS, width: int = HAND_WIDTH) -> SteeringPlan:
    provenance = {} if entry is None else {"largest_magnitude": entry}
    return SteeringPlan(width, layers, (Add(0, random_vector(width, seed=0)),), provenance)


def measured(unsteered: list[float], steered: list[float], **sizes: int) -> SteeringPlan:
    return plan_with({"unsteered": unsteered, "steered": steered}, **sizes)


@pytest.mark.parametrize(
    ("unsteered", "steered", "message"),
    [
        (
            [1, 300, 400],
            [1, 310, 390],
            r"reaches 400 unsteered and 390 steered in block 2; Pow '.*' squares it in float16, up to 65504 = "
            r"255\.9²: the model overflows by itself; export with --dtype bfloat16 or float32, or go on with "
            "--allow-overflow$",
        ),
        (
            [1, 2, 3],
            [1, 256, 3],
            "reaches 2 unsteered and 256 steered in block 1; Pow .*: steering makes it overflow; export with "
            "--dtype bfloat16 or float32, calibrate with a smaller --alpha, or go on with --allow-overflow$",
        ),
        ([1, 2, 257], [1e4, 2, 3], "in block 2; .*: the model overflows by itself"),
        ([70000, 1, 1], [70000, 1, 1], "in block 0; the graph holds it in float16, up to 65504: the model"),
    ],
    ids=["the model's own", "steering's", "either, in different blocks", "the stream itself"],
)
def test_a_float16_overflow_is_refused_unless_told(
    written_out: onnx.ModelProto,
    unsteered: list[float],
    steered: list[float],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = measured(unsteered, steered)
    for graph in (written_out, patch_model(written_out, plan).model):
        with pytest.raises(InputError, match=message):
            check_range(plan, graph)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sarsteer_export"):
            warnings = check_range(plan, graph, allow_overflow=True)
        assert warnings
        assert [record.getMessage() for record in caplog.records] == warnings
        assert not any("--allow-overflow" in warning for warning in warnings)


def test_the_limit_is_the_root_of_the_largest_value_in_any_block_and_run(
    written_out: onnx.ModelProto, caplog: pytest.LogCaptureFixture
) -> None:
    below, above = HALF_LIMIT * (1 - 1e-6), HALF_LIMIT * (1 + 1e-6)
    assert check_range(measured([below] * 3, [below] * 3), written_out) == []
    for block in range(HAND_LAYERS):
        values = [above if number == block else below for number in range(HAND_LAYERS)]
        for plan in (measured(values, [below] * 3), measured([below] * 3, values)):
            with pytest.raises(InputError, match=f"in block {block};"):
                check_range(plan, written_out)
    assert not caplog.records


def test_norms_that_widen_hold_what_the_stream_holds(
    widening: onnx.ModelProto, caplog: pytest.LogCaptureFixture
) -> None:
    assert check_range(measured([65504.0] * 3, [65504.0] * 3), widening) == []
    assert not caplog.records
    with pytest.raises(InputError, match=r"in block 1; the graph holds it in float16.* steering makes it"):
        check_range(measured([1, 1, 1], [1, 65505, 1]), widening)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_wide_types_only_warn(
    dtype: torch.dtype, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, graph = hand_decoder(Variant(dtype=dtype, norm="layer"), tmp_path / "model.onnx", opset=16)
    assert check_range(measured([1.8e19] * 3, [1.8e19] * 3), graph) == []
    (warning,) = check_range(measured([1, 1, 1], [1, 1, 2e19]), graph)
    assert f"squares it in {name}" in warning
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_what_the_runtime_decides_only_warns(fused_decoder: TinyDecoder) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(fused_decoder.proto)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    sizes = {"layers": tiny_lalm.LAYERS, "width": tiny_lalm.WIDTH}
    (warning,) = check_range(measured([1, 300, 1], [1, 300, 1], **sizes), graph)
    assert "squares it, if the runtime does not widen it, in float16" in warning
    assert "SkipSimplifiedLayerNormalization" in warning
    assert check_range(measured([1, 200, 1], [1, 200, 1], **sizes), graph) == []


def test_a_plan_that_was_not_measured_is_said_where_float16_has_to_hold_it(
    written_out: onnx.ModelProto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = check_range(plan_with(None), written_out)
    assert "whether float16 holds its square was not checked" in warning
    assert [record.getMessage() for record in caplog.records] == [warning]
    caplog.clear()
    for dtype in (torch.float32, torch.bfloat16):
        _, graph = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
        assert check_range(plan_with(None), graph) == []
    assert not caplog.records


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r"provenance\.largest_magnitude is list; expected an object"),
        ({"unsteered": [1, 2, 3]}, r"largest_magnitude\.steered is None; expected 3 numbers, one per block"),
        ({"unsteered": [1, 2], "steered": [1, 2, 3]}, r"largest_magnitude\.unsteered is \[1, 2\]"),
        ({"unsteered": [1, 2, 3], "steered": [1, -2, 3]}, r"\.steered holds -2; expected finite numbers"),
        ({"unsteered": [1, "2", 3], "steered": [1, 2, 3]}, r"\.unsteered holds '2'; expected finite numbers"),
        ({"unsteered": [1, True, 3], "steered": [1, 2, 3]}, r"\.unsteered holds True"),
    ],
)
def test_malformed_measurements_are_refused(entry: Any, message: str, written_out: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=message):
        check_range(plan_with(entry), written_out)


def test_a_plan_for_another_shape_is_refused(written_out: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="plan is for 2 decoder blocks"):
        check_range(measured([1, 1], [1, 1], layers=2), written_out)


@pytest.fixture(scope="module")
def half_decoder(lalm: Lalm, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The tiny checkpoint's decoder in float16, as `export` writes it."""
    path = tmp_path_factory.mktemp("half_decoder") / "model.onnx"
    export_decoder(copy.deepcopy(lalm.model).half(), path)
    return read_graph(path)


def scaled(lalm: Lalm, scale: float) -> Lalm:
    """The model with what the MLP of block 1 adds to the stream scaled up."""
    model = copy.deepcopy(lalm.model)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight.mul_(scale)
    return dataclasses.replace(lalm, model=model)


@pytest.mark.parametrize(("scale", "alpha"), [(1, 0.1), (1e4, 0.1), (1e7, 0.1), (1, 1e7)])
def test_a_calibrated_plan_is_held_against_an_exported_float16_decoder(
    lalm: Lalm,
    half_decoder: onnx.ModelProto,
    harmful_requests: Path,
    benign_requests: Path,
    scale: float,
    alpha: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = CalibrationSettings(steering=SteeringSettings(rank=2, alpha=alpha))
    plan = calibrate(scaled(lalm, scale), harmful_requests, benign_requests, settings)
    magnitudes = plan_magnitudes(plan)
    assert magnitudes is not None
    assert isinstance(magnitudes, StreamMagnitudes)
    norms = norm_precisions(half_decoder, find_residual_stream(half_decoder))
    assert {norm.elem_type for norm in norms} == {TensorProto.FLOAT}  # transformers' norms widen first
    if (scale, alpha) == (1e7, 0.1):
        assert min(magnitudes.unsteered[1:]) > 65504 > magnitudes.unsteered[0]
        with pytest.raises(InputError, match=r"in block [12]; .*float16.*: the model overflows by itself"):
            check_range(plan, half_decoder)
    elif alpha == 1e7:
        assert max(magnitudes.unsteered) < 65504 < max(magnitudes.steered)
        with pytest.raises(InputError, match=r"float16.*: steering makes it overflow"):
            check_range(plan, half_decoder)
    else:
        if scale == 1e4:
            assert max(magnitudes.unsteered) > HALF_LIMIT
        assert check_range(plan, half_decoder) == []
        assert not caplog.records


def test_the_norm_of_a_row_that_the_guard_refuses_is_zero_in_float16() -> None:
    """What the guard is about, in numpy."""
    row = np.array([HALF_LIMIT + 1, 1], dtype=np.float16)
    with np.errstate(over="ignore"):
        normed = row / np.sqrt(np.mean(row**2))
    np.testing.assert_array_equal(normed, 0)
