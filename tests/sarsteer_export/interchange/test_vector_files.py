"""Control vectors, `.svec` files and saved SteeringVectors: what is read of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calibration.errors import InputError, SarsteerError, UnsupportedError
from calibration.plan import Site
from sarsteer_export.interchange.control_vector import control_vector_bytes, read_control_vector
from sarsteer_export.interchange.fitting import Fitted
from sarsteer_export.interchange.gguf import gguf_bytes
from sarsteer_export.interchange.reading import read_source
from sarsteer_export.interchange.steering_vectors import save_steering_vector, steering_vector
from sarsteer_export.interchange.svec import read_svec, svec_bytes
from sarsteer_export.interchange.vectors import LayerVectors

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BY_LAYER = st.integers(1, 9).flatmap(
    lambda width: st.dictionaries(
        st.integers(1, 200), arrays(np.float32, width, elements=FLOATS), min_size=1, max_size=4
    )
)
ONES = np.ones(4, np.float32)
SVEC = {"model_type": "llama", "directions": {"3": [1.0, 2.0]}, "explained_variances": {"3": 0.5}}


def same(found: LayerVectors, by_layer: dict[int, np.ndarray]) -> None:
    assert found.by_layer.keys() == by_layer.keys()
    for layer, vector in by_layer.items():
        np.testing.assert_array_equal(found.by_layer[layer], vector, strict=True)


@given(BY_LAYER, st.text(max_size=9))
def test_vectors_come_back_from_every_format(by_layer: dict[int, np.ndarray], model_type: str) -> None:
    fitted = Fitted(by_layer, ())
    control = read_control_vector(control_vector_bytes(fitted, model_type=model_type, plan_sha256="0" * 64))
    same(control, by_layer)
    assert control.details == {"model_hint": model_type or "unknown"}
    behavior = read_svec(svec_bytes(fitted, model_type=model_type), "behavior.svec")
    same(behavior, by_layer)
    assert behavior.details == {"model_type": model_type or "unknown"}
    assert (control.site, behavior.site) == (Site.BLOCK_OUTPUT, Site.BLOCK_INPUT)


@given(BY_LAYER)
def test_vectors_come_back_from_torch(
    tmp_path_factory: pytest.TempPathFactory, by_layer: dict[int, np.ndarray]
) -> None:
    path = tmp_path_factory.getbasetemp() / "vector.pt"
    save_steering_vector(Fitted(by_layer, ()), path)
    found = read_source(path).content
    assert isinstance(found, LayerVectors)
    same(found, by_layer)


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.architecture": "llama"}, {"direction.1": ONES}, "is this a model's GGUF file"),
        ({}, {"direction.1": ONES}, "general.architecture is None"),
        ({"general.architecture": "controlvector"}, {}, "it holds no vectors"),
        ({"general.architecture": "controlvector"}, {"direction.x": ONES}, "'direction.x' is no direction"),
        ({"general.architecture": "controlvector"}, {"direction.01": ONES}, "'direction.01' is no direction"),
        (
            {"general.architecture": "controlvector"},
            {"direction.1": ONES, "other": ONES},
            "'other' is no direction",
        ),
        (
            {"general.architecture": "controlvector"},
            {"direction.1": np.ones((2, 4))},
            "expected one dimension",
        ),
        (
            {"general.architecture": "controlvector"},
            {"direction.1": ONES, "direction.2": ONES[1:]},
            "layer 2 has shape",
        ),
        (
            {"general.architecture": "controlvector"},
            {"direction.1": ONES * np.inf},
            "4 values that are NaN or infinite",
        ),
        ({"general.architecture": "controlvector"}, {"direction.999999": ONES}, "layer 999999 is no layer"),
    ],
)
def test_control_vectors_that_are_refused(metadata: Any, tensors: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_control_vector(gguf_bytes(metadata, tensors))


def test_direction_0_is_read_as_repeng_means_it_and_that_is_said() -> None:
    found = read_control_vector(gguf_bytes({"general.architecture": "controlvector"}, {"direction.0": ONES}))
    assert list(found.by_layer) == [0]
    assert any("llama.cpp refuses this file" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"directions": {"x": [1.0]}}, "the key 'x'"),
        ({"directions": {"01": [1.0]}}, "the key '01'"),
        ({"directions": {"1": [[1.0]]}}, r"layer 1 has shape \(1, 1\)"),
        ({"directions": {"1": ["one"]}}, "directions.1 is no list of numbers"),
        ({"directions": {"1": [1.0, [2.0]]}}, "directions.1 is no list of numbers"),
        ({"directions": {"1": [True]}}, "directions.1 is no list of numbers"),
        ({"directions": {"1": [1e300]}}, "NaN or infinite"),
        ({"directions": {"1": [10**400]}}, "directions.1 is no list of numbers"),
        ({"directions": {"1": None}}, "directions.1 is no list of numbers"),
        ({"directions": {"1": []}}, "layer 1 has shape"),
        ({"directions": {}}, "it holds no vectors"),
        ({"directions": [1.0]}, "it is no .svec file"),
    ],
)
def test_svec_files_that_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_svec(json.dumps(SVEC | change).encode(), "behavior.svec")


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"a":' * 5000, b"\xff{", b"[]"])
def test_other_json_is_refused(content: bytes) -> None:
    with pytest.raises(InputError):
        read_svec(content, "behavior.svec")


def test_a_condition_vector_is_refused_by_its_name_for_nothing_else_tells() -> None:
    content = json.dumps(SVEC).encode()
    with pytest.raises(UnsupportedError, match="it is never added, and plans have no conditions"):
        read_svec(content, "harmful_condition_vector.svec")
    notes = read_svec(content, "vector.svec").notes
    assert any("a condition vector looks the same" in note for note in notes)
    assert any("all 1 layers of the file are steered" in note for note in notes)


@pytest.mark.parametrize(
    "content",
    [
        {"layer_activations": {2: torch.ones(4)}, "layer_type": "decoder_block"},
        {"layer_activations": {2: torch.ones(1, 1, 4)}},
        {2: torch.ones(4, dtype=torch.float64)},
        {2: torch.ones(4, requires_grad=True)},
    ],
)
def test_fields_and_plain_dicts_are_read_as_the_object_is(content: object) -> None:
    found = steering_vector(content)
    assert found is not None
    same(found, {2: ONES})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"layer_activations": {2: torch.ones(4)}, "layer_type": "mlp"}, "layer_type is 'mlp'"),
        ({"layer_activations": {2: torch.ones(2, 4)}}, r"layer_activations\[2\] has shape \(2, 4\)"),
        ({"layer_activations": {2: torch.tensor(1.0)}}, r"has shape \(\)"),
        ({"layer_activations": {2: torch.ones(4).long()}}, "no dense tensor of floating-point"),
        ({"layer_activations": {2: torch.ones(4).to_sparse()}}, "no dense tensor of floating-point"),
        ({"layer_activations": {2: [1.0]}}, "no dense tensor of floating-point"),
        ({"layer_activations": {"2": torch.ones(4)}}, "the key '2'"),
        ({"layer_activations": [torch.ones(4)]}, "layer_activations is list"),
        ({"layer_activations": {2: torch.full((4,), 1e300, dtype=torch.float64)}}, "NaN or infinite"),
    ],
)
def test_steering_vectors_that_are_refused(content: object, words: str) -> None:
    with pytest.raises(SarsteerError, match=words):
        steering_vector(content)


@pytest.mark.parametrize("content", [{}, [torch.ones(4)], torch.ones(4), {"weight": torch.ones(4)}, {1: "x"}])
def test_other_files_of_torch_save_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(
        InputError, match="neither a SteeringVector, a dict from layer to tensor, nor a checkpoint"
    ):
        read_source(tmp_path / "other.pt")
