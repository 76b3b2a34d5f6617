"""Every family loads from its files and is driven alike: parts, inputs, hidden states, steering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint import fingerprint
from calibration.decoder_parts import find_decoder
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, audio_token_count, encode_requests, load_lalm
from calibration.plan import Add, Positions, SteeringPlan
from calibration.states import last_position_states
from calibration.steered import steered
from calibration.token_positions import last_attended
from tests.conftest import random_vector
from tests.zoo import omni, voxtral
from tests.zoo.conftest import clips
from tests.zoo.families import Family

TEXTS = ["respond.", "please respond to the audio. again.", "no."]
SECONDS = (0.5, 1.4, 0.9)
"""Shorter and longer than a chunk or window of every encoder that has them."""
BATCHING_RTOL = 2e-6
"""Left padding and batching reorder float32 sums; relative to the largest of all states, measured at most 8e-7
(Gemma 4, whose states are the largest)."""


def test_a_family_loads_from_its_directory(
    family: Family, family_checkpoint: Path, family_lalm: Lalm
) -> None:
    assert type(family_lalm.model).__name__ == family.model
    assert family_lalm.hears == family.hears
    assert family_lalm.fingerprint == fingerprint(family_checkpoint)
    assert not family_lalm.model.training


def test_a_family_runs_in_half_precision(family_checkpoint: Path) -> None:
    lalm = load_lalm(family_checkpoint, dtype="bfloat16")
    inputs = encode_requests(lalm, TEXTS, clips(lalm, *SECONDS))
    assert {value.dtype for value in inputs.values() if value.is_floating_point()} <= {torch.bfloat16}
    assert np.isfinite(last_position_states(lalm, TEXTS, clips(lalm, *SECONDS))).all()


def test_the_parts_of_its_decoder_are_found(family_lalm: Lalm) -> None:
    parts = family_lalm.parts
    text = family_lalm.model.config.get_text_config()
    assert (len(parts.blocks), parts.hidden_size) == (text.num_hidden_layers, text.hidden_size)
    assert len({type(block) for block in parts.blocks}) == 1
    assert "norm" in type(parts.final_norm).__name__.lower()
    assert parts.lm_head.weight.shape == (text.vocab_size, text.hidden_size)
    assert set(parts.blocks) < set(parts.decoder.modules())
    assert find_decoder(family_lalm.model) == parts


def test_its_audio_encoder_is_found_and_is_no_part_of_the_decoders_blocks(family_lalm: Lalm) -> None:
    audio = family_lalm.adapter.audio_parts
    if not family_lalm.hears:
        assert audio is None
        return
    assert audio is not None
    assert any(True for _ in audio.encoder.parameters())
    assert not set(audio.encoder.modules()) & {
        module for block in family_lalm.parts.blocks for module in block.modules()
    }
    if audio.projector is not None:
        assert not set(audio.projector.modules()) & set(audio.encoder.modules())
    calls = []
    for module in filter(None, (audio.encoder, audio.projector)):
        handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
        with torch.inference_mode():
            family_lalm.model(**encode_requests(family_lalm, TEXTS[:1], clips(family_lalm, 0.5)))
        handle.remove()
        assert calls
        calls.clear()


def test_text_that_stands_for_audio_is_refused(family_lalm: Lalm) -> None:
    if not family_lalm.hears:
        with pytest.raises(InputError, match="takes no audio; expected requests without audio"):
            encode_requests(family_lalm, TEXTS[:1], [np.ones(100, dtype=np.float32)])
        return
    with pytest.raises(InputError, match="which stands for a clip; remove it"):
        encode_requests(family_lalm, [f"a {family_lalm.adapter.audio_token} b"], None)
    for kind, what in (("image", "picture"), ("video", "video")):
        if (token := getattr(family_lalm.processor, f"{kind}_token", None)) is not None:
            with pytest.raises(InputError, match=f"which stands for a {what}; remove it"):
                encode_requests(family_lalm, [f"a {token} b"], None)


def test_a_batch_is_padded_on_the_left_with_one_token_for_each_audio_embedding(family_lalm: Lalm) -> None:
    audios = clips(family_lalm, *SECONDS)
    batch = encode_requests(family_lalm, TEXTS, audios)
    mask = batch["attention_mask"].numpy()
    lengths = mask.sum(axis=1)
    assert len(set(lengths)) == len(TEXTS)
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1])[None] >= (mask.shape[1] - lengths)[:, None])
    for row, length in enumerate(lengths):
        alone = encode_requests(family_lalm, TEXTS[row : row + 1], audios and audios[row : row + 1])
        np.testing.assert_array_equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        np.testing.assert_array_equal(batch["position_ids"][row, -length:], np.arange(length))
    bos = family_lalm.tokenizer.bos_token_id
    assert (batch["input_ids"] == (-1 if bos is None else bos)).sum() == (0 if bos is None else len(TEXTS))
    if audios is not None:
        marked = batch["input_ids"] == family_lalm.adapter.audio_token_id
        counts = [audio_token_count(family_lalm, clip) for clip in audios]
        assert marked.sum(dim=1).tolist() == counts
        assert min(counts) > 1


def test_text_alone_is_encoded(family_lalm: Lalm) -> None:
    batch = encode_requests(family_lalm, TEXTS, None)
    assert set(batch) <= {
        "input_ids",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "mm_token_type_ids",
    }
    if family_lalm.hears:
        assert not (batch["input_ids"] == family_lalm.adapter.audio_token_id).any()


def literal_states(lalm: Lalm, text: str, clip: np.ndarray | None) -> np.ndarray:
    """What each block returns at the last position of one request, by hooks written out (L, D)."""
    seen: dict[int, torch.Tensor] = {}
    inputs = encode_requests(lalm, [text], None if clip is None else [clip])

    def hook(layer: int):  # type: ignore[no-untyped-def]
        def keep(_module, _args, output):  # type: ignore[no-untyped-def]
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[0, -1].float()

        return keep

    layers = [module for module in lalm.model.modules() if module in lalm.parts.blocks]
    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(layers)]
    with torch.inference_mode():
        lalm.model(**inputs)
    for handle in handles:
        handle.remove()
    return np.stack([seen[layer].numpy() for layer in range(len(layers))])


def test_states_in_a_batch_are_those_of_each_request_alone(family_lalm: Lalm) -> None:
    audios = clips(family_lalm, *SECONDS)
    batched = last_position_states(family_lalm, TEXTS, audios)
    alone = np.stack(
        [
            literal_states(family_lalm, text, clip)
            for text, clip in zip(TEXTS, audios or [None] * len(TEXTS), strict=True)
        ]
    )
    tolerance = BATCHING_RTOL * float(np.abs(alone).max())
    np.testing.assert_allclose(batched, alone, rtol=0, atol=tolerance)
    assert np.abs(alone[0] - alone[1]).max() > 1000 * tolerance


def test_the_decoder_is_reached_with_everything_it_needs(family_lalm: Lalm) -> None:
    adapter = family_lalm.adapter
    inputs = encode_requests(family_lalm, TEXTS, clips(family_lalm, *SECONDS))
    with torch.inference_mode():
        reached = adapter.decoder_inputs(inputs)
        logits = adapter.logits(adapter.parts.decoder(**reached).last_hidden_state)
        np.testing.assert_array_equal(logits, family_lalm.model(**inputs, use_cache=False).logits)
        if family_lalm.hears:
            marked = inputs["input_ids"] == adapter.audio_token_id
            embeddings = adapter.audio_embeddings(inputs)
            assert embeddings.shape == (int(marked.sum()), adapter.parts.hidden_size)
            assert len(torch.unique(embeddings, dim=0)) > len(embeddings) // 2


def test_steering_acts_behind_every_block_in_prefill_and_in_cached_decode(family_lalm: Lalm) -> None:
    parts = family_lalm.parts
    width, depth = parts.hidden_size, len(parts.blocks)
    vectors = [random_vector(width, seed=layer) for layer in range(depth)]
    edits = [
        Add(layer, vector, strength=0.5, positions=Positions.LAST) for layer, vector in enumerate(vectors)
    ]
    inputs = encode_requests(family_lalm, TEXTS[:2], clips(family_lalm, *SECONDS[:2]))
    inputs.pop("position_ids")  # `generate` counts positions itself
    before, after = [], []

    def keep(into: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        def hook(_module, _args, output):  # type: ignore[no-untyped-def]
            into.append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [block.register_forward_hook(keep(before)) for block in parts.blocks]
    with torch.inference_mode(), steered(parts, SteeringPlan(width, depth, edits)):
        handles += [block.register_forward_hook(keep(after)) for block in parts.blocks]
        tokens = family_lalm.model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True
        )
    for handle in handles:
        handle.remove()
    prompt = inputs["input_ids"].shape[1]
    assert tokens.shape[1] == prompt + 3
    assert len(before) == len(after) == 3 * depth
    text = family_lalm.model.config.get_text_config()
    whole = depth - (
        getattr(text, "num_kv_shared_layers", None) or 0
    )  # blocks that get more than the last position
    assert [len(states[0]) for states in before[:whole]] == [prompt] * whole
    assert [len(states[0]) for states in before[whole:]] == [1] * (3 * depth - whole)
    for call, (plain, edited) in enumerate(zip(before, after, strict=True)):
        chosen = last_attended(inputs["attention_mask"], prompt)[:, -plain.shape[1] :]
        change = torch.where(chosen[..., None], torch.from_numpy(0.5 * vectors[call % depth]), 0.0)
        np.testing.assert_array_equal(edited, plain + change)


# ------------------------------------------------------------------------------------------------- positions


def test_all_axes_of_a_position_are_equal_for_text_and_audio(family: Family, family_lalm: Lalm) -> None:
    axes = family_lalm.parts.position_axes
    assert axes == (3 if "Omni" in family.name else 1)
    if axes == 1:
        return
    inputs = encode_requests(family_lalm, TEXTS, clips(family_lalm, *SECONDS))
    frames = inputs["feature_attention_mask"].sum(dim=1)
    own, _ = family_lalm.model.get_rope_index(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], audio_seqlens=frames
    )
    attended = inputs["attention_mask"].bool()
    for axis in own:
        np.testing.assert_array_equal(axis[attended], inputs["position_ids"][attended])


# ---------------------------------------------------------------------------------------- composite checkpoints


@pytest.mark.parametrize(
    ("save", "kind"),
    [(omni.save_whole_qwen2_5, "qwen2_5_omni"), (omni.save_whole_qwen3, "qwen3_omni_moe")],
    ids=["Qwen2.5-Omni", "Qwen3-Omni"],
)
def test_of_a_model_that_also_talks_the_thinker_is_loaded(save, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert "audio_config" not in config
    stored = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"thinker", "talker"}
    lalm = load_lalm(tmp_path)
    assert type(lalm.model).__name__.endswith("ThinkerForConditionalGeneration")
    np.testing.assert_array_equal(lalm.parts.lm_head.weight.detach(), stored["thinker.lm_head.weight"])
    assert lalm.max_audio_seconds == (omni.CHUNK_SECONDS if kind == "qwen2_5_omni" else None)
    audios = clips(lalm, 0.5)
    assert np.isfinite(last_position_states(lalm, TEXTS[:1], audios)).all()


def test_a_thinker_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    omni.save_whole_qwen2_5(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["thinker.model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights missing or of another shape: .*layers\.1\.mlp\.up_proj"):
        load_lalm(tmp_path)


# ----------------------------------------------------------------------------------------------------- Voxtral


def test_voxtral_hears_every_bit_of_a_clip_and_silence_behind_it(tmp_path: Path) -> None:
    lalm = load_lalm(voxtral.save_checkpoint(tmp_path))
    ((clip,), text) = clips(lalm, 0.7), "respond."
    inputs = encode_requests(lalm, [text], [clip])
    window = np.pad(clip, (0, 30 * lalm.sampling_rate - clip.size))
    wanted = lalm.processor.feature_extractor(window, sampling_rate=lalm.sampling_rate, return_tensors="pt")
    np.testing.assert_array_equal(inputs["input_features"], wanted["input_features"])
    ids = inputs["input_ids"][0].tolist()
    heard = [token for token in ids if token == voxtral.AUDIO_TOKEN_ID]
    assert len(heard) == 30 * 12.5
    prompt = "<s>[INST][BEGIN_AUDIO]" + "[AUDIO]" * len(heard) + text + "[/INST]"
    assert lalm.tokenizer.decode(ids) == prompt


def test_a_model_that_hears_and_has_no_chat_template_is_refused(tmp_path: Path) -> None:
    omni.save_qwen2_5(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="ThinkerForConditionalGeneration has no chat template; expected"):
        load_lalm(tmp_path)


def test_voxtral_without_its_tokenizers_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "voxtral", "audio_config": {}}))
    monkeypatch.setattr("calibration.families.voxtral.find_spec", lambda _: None)
    with pytest.raises(
        UnsupportedError, match=r"needs the package mistral-common; .*sarsteer-export\[voxtral\]"
    ):
        load_lalm(tmp_path)
