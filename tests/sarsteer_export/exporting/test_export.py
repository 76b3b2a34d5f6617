"""What cannot be exported is refused with its reason; the contract gives names and symbols."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm
from sarsteer_export import export
from sarsteer_export.bundle.manifest import EMBED_TOKENS
from sarsteer_export.exporting.audio_encoder import flat_encoder
from sarsteer_export.exporting.contract import cache_input_names, cache_output_names, name_embed_tokens
from tests.sarsteer_export.command_line import answered, listing, sarsteer


def text_model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_a_model_without_an_audio_encoder_is_not_supported() -> None:
    with pytest.raises(UnsupportedError, match="get_audio_features"):
        flat_encoder(text_model())


def test_an_audio_encoder_that_cannot_be_traced_is_left_out_and_named(
    lalm: Lalm, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_lalm: Lalm) -> None:
        raise UnsupportedError("the encoder levitates")

    monkeypatch.setattr("sarsteer_export.exporting.export._trace_audio_encoder", fail)
    monkeypatch.setattr("sarsteer_export.exporting.export.export_decoder", write_nothing)
    result = export(lalm, tmp_path / "onnx")
    assert result.missing == {"audio_encoder": "the encoder levitates"}
    assert not result.audio_encoder.exists()
    assert result.embed_tokens.is_file()
    said = sarsteer("export", checkpoint, "-o", tmp_path / "again")
    assert "audio_encoder  not exported: the encoder levitates" in answered(said)


def write_nothing(_model: object, _path: Path, *, fingerprint: str) -> None:
    assert len(fingerprint) == 64


def test_a_failed_trace_is_one_message_and_leaves_nothing(
    lalm: Lalm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        warnings.warn("noise", stacklevel=1)
        print("noise")
        logging.getLogger("torch").warning("noise")
        raise RuntimeError("unsupported operator aten::levitate\nand a page of hints")

    monkeypatch.setattr("sarsteer_export.exporting.tracing.OnnxExporter.export", fail)
    with pytest.raises(UnsupportedError) as error:
        export(lalm, tmp_path / "new" / "onnx")
    expected = "DecoderComponent: cannot be exported to ONNX (unsupported operator aten::levitate)"
    assert str(error.value) == expected
    assert listing(tmp_path) == {}
    assert not logging.root.manager.disable, "logging stayed switched off"


def test_an_output_that_exists_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists; use --overwrite"):
        export(tmp_path / "no such model", tmp_path)


def test_cache_names_are_in_graph_order() -> None:
    assert cache_input_names(2) == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert cache_output_names(1) == ["present.0.key", "present.0.value"]


def test_symbols_become_the_names_of_their_roles_everywhere() -> None:
    ids = ir.Value(name="input", shape=ir.Shape(["s77", "s12"]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Gather", [ids, ids])
    node.outputs[0].shape = ir.Shape(["s77", "s12", 8])
    model = ir.Model(ir.Graph([ids], list(node.outputs), nodes=[node], opset_imports={"": 20}), ir_version=10)
    name_embed_tokens(model)
    assert (ids.name, node.outputs[0].name) == ("input_ids", "inputs_embeds")
    assert str(ids.shape) == "[batch,sequence]"
    assert str(node.outputs[0].shape) == "[batch,sequence,8]"


def test_the_exported_embedding_is_the_model_s(lalm: Lalm, bundle_path: Path) -> None:
    model = onnx.load(bundle_path / EMBED_TOKENS)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = lalm.model.get_input_embeddings().weight  # type: ignore[operator]
    assert any(
        array.shape == tuple(weight.shape) and torch.equal(torch.from_numpy(array.copy()), weight)
        for array in constants.values()
    )
    assert model.opset_import[0].version == 20
    assert model.metadata_props[0].value == lalm.fingerprint
