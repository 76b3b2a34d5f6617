"""Where a decoder's parts are: by accessors, by structure under other names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from calibration.decoder_parts import find_decoder
from calibration.errors import UnsupportedError
from calibration.plan import Add, SteeringPlan
from calibration.states import recorded_block_outputs
from calibration.steered import steered
from tests.conftest import random_vector

WIDTH, DEPTH = 16, 2


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=WIDTH, n_layer=DEPTH, n_head=2, bos_token_id=1, eos_token_id=2)
    ).eval()


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(vocab_size=30, hidden_size=WIDTH, n_layer=DEPTH, n_head=2)).eval()


@pytest.mark.parametrize(
    ("build", "norm"),
    [(gpt2, "ln_f"), (bloom, "ln_f")],
    ids=["GPT-2", "BLOOM, with a norm before its blocks"],
)
def test_parts_of_other_names_are_found_by_structure(build, norm: str) -> None:  # type: ignore[no-untyped-def]
    model = build()
    parts = find_decoder(model)
    assert parts.decoder is model.transformer
    assert parts.blocks == tuple(model.transformer.h)
    assert parts.final_norm is getattr(model.transformer, norm)
    assert parts.lm_head is model.lm_head
    assert (parts.hidden_size, parts.position_axes) == (WIDTH, 1)


def test_what_was_found_by_structure_is_steered() -> None:
    model = gpt2()
    vector = random_vector(WIDTH, seed=0)
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode(), recorded_block_outputs(find_decoder(model)) as plain:
        model(ids)
        kept = plain[0].clone()
        with steered(model, SteeringPlan(WIDTH, DEPTH, [Add(0, vector, strength=1.0)])):
            seen = {}
            handle = model.transformer.h[1].register_forward_pre_hook(
                lambda _, args: seen.update(states=args[0])
            )
            model(ids)
            handle.remove()
    torch.testing.assert_close(seen["states"][0, -1], kept[0, -1] + torch.from_numpy(vector), rtol=0, atol=0)
    torch.testing.assert_close(seen["states"][0, :-1], kept[0, :-1], rtol=0, atol=0)


def test_two_lists_of_blocks_are_not_chosen_between() -> None:
    model = gpt2()
    model.transformer.more = torch.nn.ModuleList(list(model.transformer.h))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel: no decoder found; without decoder blocks"):
        find_decoder(model)


def test_a_decoder_that_attends_to_an_encoder_is_refused() -> None:
    config = T5Config(vocab_size=30, d_model=WIDTH, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="its decoder attends to an encoder's states"):
        find_decoder(T5ForConditionalGeneration(config))


def test_blocks_that_pass_several_streams_are_refused() -> None:
    config = Gemma3nTextConfig(
        vocab_size=30,
        vocab_size_per_layer_input=30,
        hidden_size=WIDTH,
        hidden_size_per_layer_input=8,
        intermediate_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * DEPTH,
        layer_types=["full_attention"] * DEPTH,
    )
    model = Gemma3nForCausalLM(config).eval()
    plan = SteeringPlan(WIDTH, DEPTH, [Add(0, random_vector(WIDTH, seed=0), strength=1.0)])
    with (
        pytest.raises(UnsupportedError, match="Gemma3nForCausalLM: Gemma 3n is not supported"),
        steered(model, plan),
    ):
        model(torch.tensor([[3, 4, 5]]))
