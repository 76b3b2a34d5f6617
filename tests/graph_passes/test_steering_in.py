"""The steering in a graph is read back by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from calibration.errors import InputError
from calibration.plan import Add, Positions, Project, Site, SteeringPlan
from graph_passes.names import edit_of
from graph_passes.patch import patch_model
from graph_passes.steering_in import edit_initializers, steering_constants, steering_tensors
from tests.conftest import random_basis, random_vector
from tests.decoders import HAND_LAYERS, HAND_WIDTH, Variant, hand_decoder

ADD = Add(2, random_vector(HAND_WIDTH, seed=1), strength=0.3)
PROJECT = Project(
    0,
    random_basis(HAND_WIDTH, 3, seed=2),
    random_vector(HAND_WIDTH, seed=3),
    site=Site.BLOCK_INPUT,
    strength=0.7,
)
PLAN = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (ADD, PROJECT))
ADDED, PROJECTED = "sarsteer.2.block_output.add.0", "sarsteer.0.block_input.project.0"


def steered(folder: Path, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    return patch_model(hand_decoder(Variant(dtype=dtype), folder / "model.onnx")[1], PLAN).model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_constant_with_dimensions_is_read_with_its_values(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = steering_tensors(steered(tmp_path, dtype))
    assert (
        ADD.positions is PROJECT.positions is Positions.LAST
    )  # so that there are scalars and a mask to leave out
    assert list(tensors) == [
        f"{ADDED}.vector",
        *(f"{PROJECTED}.{k}" for k in ("mean", "basis", "basis_scaled")),
    ]
    vector = tensors[f"{ADDED}.vector"]
    assert vector.dtype.name == str(dtype).removeprefix("torch.")
    rounded = torch.from_numpy(np.float32(0.3) * ADD.vector).to(dtype).float().numpy()
    np.testing.assert_array_equal(vector.astype(np.float32), rounded)
    assert PROJECT.mean is not None
    for key, values in {
        "mean": PROJECT.mean,
        "basis": PROJECT.basis,
        "basis_scaled": (np.float32(0.7) * PROJECT.basis).T,
    }.items():
        assert tensors[f"{PROJECTED}.{key}"].dtype == np.float32
        np.testing.assert_array_equal(tensors[f"{PROJECTED}.{key}"], values)


def test_the_initializers_of_edits_are_the_graphs_own_scalars_included(tmp_path: Path) -> None:
    model = steered(tmp_path)
    found = edit_initializers(model)
    assert set(found) == set(steering_tensors(model)) | {f"{ADDED}.nothing", f"{PROJECTED}.nothing"}
    found[f"{ADDED}.vector"].raw_data = np.ones(HAND_WIDTH, np.float32).tobytes()
    np.testing.assert_array_equal(steering_tensors(model)[f"{ADDED}.vector"], np.ones(HAND_WIDTH))


def test_constants_are_listed_with_shape_and_norm(tmp_path: Path) -> None:
    first, *others = steering_constants(steered(tmp_path))
    assert (first.layer, first.site, first.op, first.name) == (2, "block_output", "add", f"{ADDED}.vector")
    assert (first.elem_type, first.shape) == ("float32", (HAND_WIDTH,))
    assert first.norm == pytest.approx(0.3 * float(np.linalg.norm(ADD.vector)))
    assert [constant.shape for constant in others] == [(HAND_WIDTH,), (HAND_WIDTH, 3), (3, HAND_WIDTH)]
    assert {(constant.layer, constant.site, constant.op) for constant in others} == {
        (0, "block_input", "project")
    }


def test_an_unsteered_graph_holds_none(tmp_path: Path) -> None:
    _, proto = hand_decoder(Variant(), tmp_path / "model.onnx")
    assert steering_tensors(proto) == {}
    assert edit_initializers(proto) == {}
    assert steering_constants(proto) == ()


def test_a_constant_in_external_data_is_refused(tmp_path: Path) -> None:
    model = steered(tmp_path)
    tensor = edit_initializers(model)[f"{ADDED}.nothing"]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data.bin")
    for read in (edit_initializers, steering_tensors, steering_constants):
        with pytest.raises(InputError, match=rf"'{ADDED}\.nothing' lies in external data"):
            read(model)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("sarsteer.2.block_output.add.0.vector", "sarsteer.2.block_output.add.0"),
        ("sarsteer.11.final_norm_output.project.3.basis_scaled", "sarsteer.11.final_norm_output.project.3"),
        ("sarsteer.last.as_width", None),
        ("sarsteer.zeros.value", None),
        ("sarsteer.unsteered.model.layers.0.add", None),
        ("model.2.block_output.add.0.vector", None),
        ("sarsteer.2.block_output.add.0", None),
        ("weight", None),
        ("", None),
    ],
)
def test_names_of_edits_are_told_from_others(name: str, edit: str | None) -> None:
    assert edit_of(name) == edit
