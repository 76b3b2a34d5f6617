"""Loading a checkpoint: what is accepted, what is refused, and how requests become model inputs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from calibration.checkpoint import fingerprint, hears_audio, listening_part
from calibration.decoder_parts import find_decoder
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests, load_lalm
from calibration.not_supported import NOT_SUPPORTED, NotSupported
from calibration.requests import load_audio, read_requests
from calibration.token_positions import position_ids
from tests import tiny_lalm


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def clips(requests: Path) -> list[np.ndarray]:
    return [
        load_audio(request.audio, sampling_rate=tiny_lalm.SAMPLING_RATE)
        for request in read_requests(requests)
    ]


def test_a_checkpoint_loads_with_its_parts(checkpoint: Path) -> None:
    lalm = load_lalm(str(checkpoint))
    assert lalm.path == checkpoint
    assert not lalm.model.training
    assert lalm.model.dtype == torch.float32
    assert lalm.sampling_rate == tiny_lalm.SAMPLING_RATE
    assert lalm.max_audio_seconds == tiny_lalm.CHUNK_SECONDS
    parts = lalm.parts
    assert (len(parts.blocks), parts.hidden_size) == (tiny_lalm.LAYERS, tiny_lalm.WIDTH)
    assert type(parts.blocks[0]).__name__ == "Qwen2DecoderLayer"
    assert type(parts.final_norm).__name__ == "Qwen2RMSNorm"
    assert parts.lm_head.weight.shape == (len(lalm.processor.tokenizer), tiny_lalm.WIDTH)


def test_the_weights_are_those_of_the_file(checkpoint: Path, lalm: Lalm) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    name = next(name for name in stored if name.endswith("layers.1.mlp.up_proj.weight"))
    np.testing.assert_array_equal(lalm.parts.blocks[1].mlp.up_proj.weight.detach(), stored[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_checkpoint_loads_in_the_dtype_asked_for(checkpoint: Path, dtype: str) -> None:
    assert load_lalm(checkpoint, dtype=dtype).model.dtype == getattr(torch, dtype)


def test_an_unknown_dtype_or_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="dtype is 'int8'; expected one of float32, float16, bfloat16"):
        load_lalm(checkpoint, dtype="int8")
    with pytest.raises(UnsupportedError, match="device 'abacus' cannot be used here"):
        load_lalm(checkpoint, device="abacus")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_lalm(tmp_path / "none")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            (config[section] if section else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut(name: str, length: int = 100) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "config cut": (cut("config.json"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no object"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not JSON"),
    "unknown architecture": (edit_config(architectures=["Nothing"]), "architecture 'Nothing', which transf"),
    "no architecture": (edit_config(architectures=None), "architecture None"),
    "architecture no model": (edit_config(architectures=["AutoConfig"]), "architecture 'AutoConfig'"),
    "architecture abstract": (edit_config(architectures=["PreTrainedModel"]), "cannot be loaded"),
    "another architecture": (edit_config(architectures=["Qwen2ForCausalLM"]), "weights missing"),
    "width a text": (edit_config(text_config__hidden_size="wide"), "cannot be loaded .*hidden_size"),
    "no heads": (edit_config(text_config__num_attention_heads=0), "cannot be loaded"),
    "other width": (edit_config(text_config__hidden_size=32), "cannot be loaded"),
    "weights cut": (cut("model.safetensors", 5000), "cannot be loaded .*Safetensor"),
    "weights gone": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no file named model.safetensors",
    ),
    "weights pickled": (pickled_weights, "no file named model.safetensors"),
    "tensor missing": (drop_tensor, r"weights missing .*layers\.1\.mlp\.up_proj\.weight"),
    "tensor reshaped": (reshape_tensor, "cannot be loaded"),
    "tokenizer cut": (cut("tokenizer.json"), "cannot be loaded"),
    "processor gone": (lambda folder: (folder / "processor_config.json").unlink(), "cannot be loaded"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_name(
    damaged: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(damaged)
    with pytest.raises(InputError, match=f"model {re.escape(str(damaged))}: .*{message}") as caught:
        load_lalm(damaged)
    assert "\n" not in str(caught.value)


def tiny_text_model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_a_text_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tiny_text_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Qwen2ForCausalLM has no audio encoder and no chat template"):
        load_lalm(tmp_path)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    tiny_text_model().model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Qwen2Model has no audio encoder and is no causal language model"):
        load_lalm(tmp_path)


def test_remote_code_is_never_run(damaged: Path) -> None:
    edit_config(auto_map={"AutoProcessor": "evil.Processor", "AutoConfig": "evil.Config"})(damaged)
    (damaged / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert load_lalm(damaged).fingerprint


def test_the_decoder_of_another_kind_of_model_is_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match="Linear is not a transformers model"):
        find_decoder(torch.nn.Linear(2, 2))
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=30,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    with pytest.raises(UnsupportedError, match="WhisperForConditionalGeneration: no decoder found"):
        find_decoder(whisper)


def test_the_decoder_of_a_text_model_is_found() -> None:
    model = tiny_text_model()
    parts = find_decoder(model)
    assert parts.decoder is model.model
    assert parts.blocks == tuple(model.model.layers)


# ----------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_configuration_and_weights(checkpoint: Path, damaged: Path) -> None:
    assert fingerprint(damaged) == fingerprint(checkpoint) == load_lalm(damaged).fingerprint
    (damaged / "generation_config.json").unlink()
    assert fingerprint(damaged) == fingerprint(checkpoint)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = fingerprint(damaged)
    assert changed != fingerprint(checkpoint)
    edit_config(text_config__rms_norm_eps=1e-5)(damaged)
    assert fingerprint(damaged) not in (changed, fingerprint(checkpoint))


# ---------------------------------------------------------------------------------------------------- inputs


def test_one_request_is_encoded_as_the_processor_does(lalm: Lalm, harmful_requests: Path) -> None:
    clip = clips(harmful_requests)[0]
    content = [{"type": "audio", "audio": ""}, {"type": "text", "text": "please respond."}]
    prompt = lalm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert "please respond." in prompt
    expected = lalm.processor(
        text=prompt, audio=[clip], sampling_rate=tiny_lalm.SAMPLING_RATE, return_tensors="pt"
    )
    encoded = encode_requests(lalm, ["please respond."], [clip])
    assert encoded.keys() == expected.keys() | {"position_ids"}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(encoded[name], tensor)
    length = encoded["input_ids"].shape[1]
    np.testing.assert_array_equal(encoded["position_ids"], np.arange(length)[None])


def test_text_alone_is_encoded_without_audio(lalm: Lalm) -> None:
    encoded = encode_requests(lalm, ["please respond."], None)
    assert encoded.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert "<|AUDIO|>" not in lalm.processor.tokenizer.decode(encoded["input_ids"][0])


def test_a_batch_is_padded_on_the_left_and_positions_count_attended_tokens(
    lalm: Lalm, harmful_requests: Path
) -> None:
    audios = clips(harmful_requests)[:3]
    batch = encode_requests(lalm, ["respond."] * 3, audios)
    mask = batch["attention_mask"].numpy()
    lengths = mask.sum(axis=1)
    assert len(set(lengths)) == 3
    width = mask.shape[1]
    np.testing.assert_array_equal(mask, np.arange(width)[None] >= (width - lengths)[:, None])
    for row, (clip, length) in enumerate(zip(audios, lengths, strict=True)):
        alone = encode_requests(lalm, ["respond."], [clip])
        np.testing.assert_array_equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        np.testing.assert_array_equal(batch["position_ids"][row, -length:], np.arange(length))
        np.testing.assert_array_equal(batch["position_ids"][row, :-length], 0)


def test_a_tokenizer_that_pads_on_the_right_is_turned(checkpoint: Path, harmful_requests: Path) -> None:
    lalm = load_lalm(checkpoint)
    lalm.processor.tokenizer.padding_side = "right"
    batch = encode_requests(lalm, ["respond."] * 3, clips(harmful_requests)[:3])
    np.testing.assert_array_equal(batch["attention_mask"][:, -1], 1)


def test_features_have_the_dtype_of_the_model(checkpoint: Path, harmful_requests: Path) -> None:
    lalm = load_lalm(checkpoint, dtype="bfloat16")
    encoded = encode_requests(lalm, ["respond."], clips(harmful_requests)[:1])
    assert encoded["input_features"].dtype == torch.bfloat16


def test_position_ids_count_attended_tokens_only() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(
        position_ids(mask), [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    )


# -------------------------------------------------------------------------------------- what cannot be driven


@pytest.mark.parametrize("family", NOT_SUPPORTED, ids=lambda family: family.name)
def test_a_family_that_cannot_be_driven_is_refused_with_the_reason(
    family: NotSupported, damaged: Path
) -> None:
    for model_type in family.model_types:
        assert model_type in transformers.CONFIG_MAPPING
        edit_config(model_type=model_type)(damaged)
        with pytest.raises(
            UnsupportedError, match=f"{family.name} is not supported: {re.escape(family.reason)}"
        ):
            load_lalm(damaged)


def test_what_hears_is_read_from_the_configuration() -> None:
    assert hears_audio({"audio_config": {}})
    assert hears_audio({"audio_token_index": 5, "encoder_config": {}})
    assert hears_audio({"thinker_config": {"audio_config": {}}, "talker_config": {"audio_token_index": 5}})
    assert not hears_audio({"audio_config": None, "audio_token_id": 5})
    assert not hears_audio({"vision_config": {}, "talker_config": {"audio_token_index": 5}})
    assert listening_part({"thinker_config": {"audio_config": {}}, "talker_config": {}}) == "thinker_config"
    assert listening_part({"audio_config": {}, "other": {"audio_config": {}}}) is None
