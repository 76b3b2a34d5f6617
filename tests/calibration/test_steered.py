"""The eager steered model: every operation, site and kind of position against the literal equations.

Dimensions: B batch, S sequence of a forward pass, P past, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.decoder_parts import DecoderParts
from calibration.errors import InputError, UnsupportedError
from calibration.lalm import Lalm, encode_requests, load_lalm
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from calibration.requests import load_audio, read_requests
from calibration.states import recorded_block_outputs
from calibration.steered import steered
from calibration.token_positions import position_ids
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, padded, plan_of, random_basis, random_vector
from tests.decoders import no_past, run_eager
from tests.reference import literally_steered

LITERAL_ATOL = 5e-6
"""float32 against float64 arithmetic in the edits: measured at most 6e-7 on logits of magnitude 2."""

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
KINDS = [(op, site, positions) for op in ("add", "project") for site, positions in SITES]


def edit_of(op: str, site: Site, positions: Positions, layer: int = 1) -> Edit:
    return one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=layer)


def embeddings(batch: int = 3, sequence: int = 5, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, sequence, WIDTH, generator=torch.Generator().manual_seed(seed))


def prefill(lalm: Lalm, mask_BS: torch.Tensor, embeds_BSD: torch.Tensor | None = None) -> list[torch.Tensor]:
    embeds_BSD = embeddings(*mask_BS.shape) if embeds_BSD is None else embeds_BSD
    return run_eager(lalm.model, embeds_BSD, mask_BS, position_ids(mask_BS), no_past(len(mask_BS)))


def assert_same_where_attended(got: list[torch.Tensor], expected: list[torch.Tensor], mask: Any) -> None:
    """Logits of attended positions, and keys and values of attended columns, are equal up to LITERAL_ATOL."""
    attended_BT = mask.bool()
    attended_BS = attended_BT[:, -got[0].shape[1] :]
    np.testing.assert_allclose(got[0][attended_BS], expected[0][attended_BS], rtol=0, atol=LITERAL_ATOL)
    for one, other in zip(got[1:], expected[1:], strict=True):
        columns = [tensor.transpose(1, 2)[attended_BT] for tensor in (one, other)]
        np.testing.assert_allclose(columns[0], columns[1], rtol=0, atol=LITERAL_ATOL)


def test_sarsteer_in_its_own_words(lalm: Lalm) -> None:
    """`out_l[:, -1, :] += alpha * v_perp_l` on every block's output (METHOD, inference), bit for bit."""
    vectors = [random_vector(WIDTH, seed=layer) for layer in range(LAYERS)]
    mask = padded("left")

    def hook(v: np.ndarray) -> Any:
        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            out = output.clone()
            out[:, -1, :] += torch.tensor(0.1) * torch.tensor(v)
            return out

        return add

    handles = [
        block.register_forward_hook(hook(v)) for block, v in zip(lalm.parts.blocks, vectors, strict=True)
    ]
    expected = prefill(lalm, mask)
    for handle in handles:
        handle.remove()
    with steered(lalm.model, plan_of(*(Add(n, v, strength=0.1) for n, v in enumerate(vectors)))):
        got = prefill(lalm, mask)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (got[0] - prefill(lalm, mask)[0])[:, -1].abs().max() > 0.01


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("op", "site", "positions"), KINDS)
def test_every_edit_follows_its_equation_in_prefill_and_decode(
    lalm: Lalm, op: str, site: Site, positions: Positions, padding: str
) -> None:
    plan, parts = plan_of(edit_of(op, site, positions)), lalm.parts
    mask = padded(padding)
    with literally_steered(parts.blocks, parts.final_norm, plan, mask):
        expected = prefill(lalm, mask)
    plain = prefill(lalm, mask)
    with steered(lalm.model, plan):
        got = prefill(lalm, mask)
    assert_same_where_attended(got, expected, mask)
    assert (got[0] - plain[0])[mask.bool()].abs().max() > 1000 * LITERAL_ATOL
    for step in range(2):  # decode, one token at a time
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
        arguments = (embeddings(3, 1, seed=step + 7), mask, position_ids(mask)[:, -1:], got[1:])
        with literally_steered(parts.blocks, parts.final_norm, plan, mask):
            expected = run_eager(lalm.model, *arguments)
        with steered(lalm.model, plan):
            got = run_eager(lalm.model, *arguments)
        assert_same_where_attended(got, expected, mask)


TOKENS = [
    Positions.PROMPT,
    Positions.GENERATED,
    Positions.first(2),
    Positions.range(1, 6),
    Positions.range(3),
]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("positions", TOKENS, ids=[kind.value for kind in TOKENS])
@pytest.mark.parametrize("told", [True, False])
def test_tokens_are_chosen_as_they_are_counted_one_by_one(
    lalm: Lalm, positions: Positions, padding: str, told: bool
) -> None:
    """Whether prompt lengths are given, or taken from the pass without past that came before."""
    edits = [
        edit_of("add", Site.BLOCK_OUTPUT, positions, 0),
        edit_of("project", Site.BLOCK_INPUT, positions, 1),
    ]
    plan, parts = plan_of(*edits), lalm.parts
    mask = padded(padding)
    lengths = mask.sum(1)
    changed = False
    with steered(lalm.model, plan, prompt_lengths=lengths if told else None):
        got = prefill(lalm, mask)
        passes = [((embeddings(*mask.shape), mask, position_ids(mask), no_past(3)), got)]
        for step in range(3):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            arguments = (embeddings(3, 1, seed=step + 7), mask, position_ids(mask)[:, -1:], got[1:])
            got = run_eager(lalm.model, *arguments)
            passes.append((arguments, got))
    for arguments, answer in passes:
        plain = run_eager(lalm.model, *arguments)
        with literally_steered(parts.blocks, parts.final_norm, plan, arguments[1], lengths.tolist()):
            expected = run_eager(lalm.model, *arguments)
        assert_same_where_attended(answer, expected, arguments[1])
        attended = arguments[1][:, -answer[0].shape[1] :].bool()
        changed |= bool((answer[0] - plain[0])[attended].abs().max() > 1000 * LITERAL_ATOL)
    assert changed


def test_a_prompt_that_was_not_seen_is_not_guessed(lalm: Lalm) -> None:
    past = prefill(lalm, torch.ones(2, 3, dtype=torch.long))[1:]
    mask = torch.ones(2, 4, dtype=torch.long)
    arguments = (embeddings(2, 1), mask, position_ids(mask)[:, -1:], past)
    with (
        steered(lalm.model, plan_of(edit_of("add", Site.BLOCK_OUTPUT, Positions.GENERATED))),
        pytest.raises(UnsupportedError, match="give prompt_lengths"),
    ):
        run_eager(lalm.model, *arguments)


def test_strengths_are_factors_by_row_or_by_row_and_edit(lalm: Lalm) -> None:
    """A row's factor does what the same factor in the plan does, and 0 leaves it as it is, bit for bit."""
    edits = [edit_of(*kind, layer=number % LAYERS) for number, kind in enumerate(KINDS)]
    plan, mask = plan_of(*edits), padded("left")
    plain = prefill(lalm, mask)[0]
    with steered(lalm.model, plan, strength=torch.tensor([0.0, 0.5, -1.0])):
        got = prefill(lalm, mask)[0]
    np.testing.assert_array_equal(got[0], plain[0])
    for row, factor in ((1, 0.5), (2, -1.0)):
        scaled = [dataclasses.replace(edit, strength=edit.strength * factor) for edit in edits]
        with steered(lalm.model, plan_of(*scaled)):
            expected = prefill(lalm, mask)[0]
        attended = mask[row].bool()
        np.testing.assert_allclose(got[row][attended], expected[row][attended], rtol=0, atol=LITERAL_ATOL)
        assert (got - plain)[row][attended].abs().max() > 1000 * LITERAL_ATOL
    columns = torch.zeros(3, len(edits))
    columns[:, 0] = 1.0
    with steered(lalm.model, plan, strength=columns):
        one = prefill(lalm, mask)[0]
    with steered(lalm.model, plan_of(edits[0])):
        np.testing.assert_array_equal(one, prefill(lalm, mask)[0])


@pytest.mark.parametrize("shape", [(), (3, 2), (3, 1, 1)])
def test_strengths_of_another_shape_are_refused(lalm: Lalm, shape: tuple[int, ...]) -> None:
    plan = plan_of(edit_of(*KINDS[0]))
    with (
        pytest.raises(InputError, match=r"strength has shape .*; expected \(batch,\) or \(batch, 1\)"),
        steered(lalm.model, plan, strength=torch.ones(shape)),
    ):
        pass


def is_steering(hook: Any) -> bool:
    return getattr(getattr(hook, "func", hook), "__module__", "") == "calibration.steered"


@pytest.mark.parametrize("positions", [Positions.LAST, Positions.ALL])
def test_a_chunked_prefill_steers_each_chunk_by_its_own_mask(lalm: Lalm, positions: Positions) -> None:
    plan, parts = plan_of(edit_of("add", Site.BLOCK_OUTPUT, positions)), lalm.parts
    past = prefill(lalm, padded("left"))[1:]
    chunk = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    mask = torch.cat([padded("left"), chunk], dim=1)
    arguments = (embeddings(3, 3, seed=4), mask, position_ids(mask)[:, -3:], past)
    with literally_steered(parts.blocks, parts.final_norm, plan, mask):
        expected = run_eager(lalm.model, *arguments)
    with steered(lalm.model, plan):
        got = run_eager(lalm.model, *arguments)
    assert_same_where_attended(got, expected, mask)


def test_a_row_that_attends_to_nothing_is_not_edited(lalm: Lalm) -> None:
    """In a chunk that is padding for one row, `last` touches the other row only."""
    vector = random_vector(WIDTH, seed=0, scale=10)
    past = prefill(lalm, torch.ones(2, 3, dtype=torch.long))[1:]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arguments = (embeddings(2, 2), mask, position_ids(mask)[:, -2:], past)
    with recorded_block_outputs(lalm.parts) as outputs:
        run_eager(lalm.model, *arguments)
        plain = outputs[1].clone()
    with steered(lalm.model, plan_of(Add(1, vector))), recorded_block_outputs(lalm.parts) as outputs:
        run_eager(lalm.model, *arguments)
        np.testing.assert_array_equal(outputs[1][1], plain[1])
        np.testing.assert_array_equal(outputs[1][0, 0], plain[0, 0])
        np.testing.assert_array_equal(outputs[1][0, 1], plain[0, 1].numpy() + vector)


def test_without_a_mask_the_last_position_is_the_last_of_the_sequence(lalm: Lalm) -> None:
    ids = torch.tensor([[10, 11, 12, 13]])
    plan = plan_of(edit_of("add", Site.BLOCK_OUTPUT, Positions.LAST))
    with torch.inference_mode(), steered(lalm.model, plan):
        masked = lalm.parts.decoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        bare = lalm.parts.decoder(input_ids=ids).last_hidden_state
    np.testing.assert_array_equal(bare, masked)


def test_a_mask_that_is_not_two_dimensional_is_refused(lalm: Lalm) -> None:
    ids = torch.tensor([[10, 11, 12, 13]])
    plan, wrong = plan_of(Add(1, random_vector(WIDTH, seed=0))), torch.ones(1, 1, 4, 4)
    message = r"2-D attention mask .* got torch.Size\(\[1, 1, 4, 4\]\)"
    with steered(lalm.model, plan), pytest.raises(UnsupportedError, match=message):
        lalm.parts.decoder(input_ids=ids, attention_mask=wrong)


# ------------------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def requests(harmful_requests: Path) -> list[tuple[str, np.ndarray]]:
    """Three prompts with their clips, of unequal length."""
    found = read_requests(harmful_requests)[:3]
    return [(one.text, load_audio(one.audio, sampling_rate=tiny_lalm.SAMPLING_RATE)) for one in found]


@pytest.fixture(scope="module")
def spoken(lalm: Lalm, requests: list[tuple[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    texts, audios = zip(*requests, strict=True)
    return encode_requests(lalm, texts, audios)


@pytest.fixture(scope="module")
def spoken_alone(lalm: Lalm, requests: list[tuple[str, np.ndarray]]) -> list[dict[str, torch.Tensor]]:
    return [encode_requests(lalm, [text], [clip]) for text, clip in requests]


def greedy(lalm: Lalm, spoken: dict[str, torch.Tensor], tokens: int = 4) -> np.ndarray:
    inputs = {name: tensor for name, tensor in spoken.items() if name != "position_ids"}
    with torch.inference_mode():
        generated = lalm.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return torch.stack(generated.scores, dim=1).numpy()


def test_generate_is_steered_in_prefill_and_in_every_step(
    lalm: Lalm, spoken: dict[str, torch.Tensor]
) -> None:
    """Each generated score equals a hand-written rollout with the literal equations."""
    plan, parts = plan_of(edit_of("add", Site.BLOCK_OUTPUT, Positions.LAST)), lalm.parts
    with steered(lalm.model, plan):
        scores = greedy(lalm, spoken)
    plain = greedy(lalm, spoken)
    assert np.abs(scores - plain)[:, 0].max() > 0.01
    assert not np.array_equal(scores.argmax(-1), plain.argmax(-1))
    with torch.inference_mode():
        mask = spoken["attention_mask"]
        with literally_steered(parts.blocks, parts.final_norm, plan, mask):
            output = lalm.model(**spoken, use_cache=True)
        for step in range(scores.shape[1]):
            np.testing.assert_allclose(output.logits[:, -1], scores[:, step], rtol=0, atol=LITERAL_ATOL)
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            with literally_steered(parts.blocks, parts.final_norm, plan, mask):
                output = lalm.model(
                    input_ids=output.logits[:, -1:].argmax(-1),
                    attention_mask=mask,
                    position_ids=position_ids(mask)[:, -1:],
                    past_key_values=output.past_key_values,
                )


@pytest.mark.parametrize(("op", "site", "positions"), KINDS)
def test_a_left_padded_batch_gives_what_each_request_gives_alone(
    lalm: Lalm,
    spoken: dict[str, torch.Tensor],
    spoken_alone: list[dict[str, torch.Tensor]],
    op: str,
    site: Site,
    positions: Positions,
) -> None:
    with torch.inference_mode(), steered(lalm.model, plan_of(edit_of(op, site, positions))):
        batched = lalm.model(**spoken).logits[:, -1]
        alone = torch.cat([lalm.model(**inputs).logits[:, -1] for inputs in spoken_alone])
    np.testing.assert_allclose(batched, alone, rtol=0, atol=LITERAL_ATOL)


# --------------------------------------------------------------------------------------- strength and order


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_strength_zero_is_exact(lalm: Lalm, padding: str) -> None:
    edits = [dataclasses.replace(edit_of(*kind), strength=0.0) for kind in KINDS]
    mask = padded(padding)
    plain = prefill(lalm, mask)
    with steered(lalm.model, plan_of(*edits)):
        got = prefill(lalm, mask)
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_sign_of_the_strength_is_the_sign_of_the_effect(lalm: Lalm) -> None:
    add = Add(LAYERS - 1, random_vector(WIDTH, seed=0), strength=0.5)
    effects = []
    for edit in (add, dataclasses.replace(add, strength=-0.5)):
        with recorded_block_outputs(lalm.parts) as outputs:
            prefill(lalm, padded("none"))
            plain = outputs[-1].clone()
        with steered(lalm.model, plan_of(edit)), recorded_block_outputs(lalm.parts) as outputs:
            prefill(lalm, padded("none"))
            effects.append((outputs[-1] - plain)[:, -1])
    np.testing.assert_allclose(effects[0], -effects[1], rtol=0, atol=1e-6)  # one rounding of states below 8
    np.testing.assert_allclose(effects[0][0], 0.5 * add.vector, rtol=0, atol=1e-6)


def test_edits_at_one_tensor_act_in_order(lalm: Lalm) -> None:
    """Output edits of a block act before input edits of the next, each kind in the plan's order."""
    add = Add(0, random_vector(WIDTH, seed=0, scale=3), positions=Positions.ALL)
    project = Project(0, random_basis(WIDTH, 8, seed=1), positions=Positions.ALL)
    following = Project(1, random_basis(WIDTH, 8, seed=2), site=Site.BLOCK_INPUT, positions=Positions.ALL)
    mask, parts = padded("none"), lalm.parts
    results = []
    for edits in ((add, project), (project, add), (following, add), (add, following)):
        plan = plan_of(*edits)
        with literally_steered(parts.blocks, parts.final_norm, plan, mask):
            expected = prefill(lalm, mask)
        with steered(lalm.model, plan):
            results.append(prefill(lalm, mask))
        assert_same_where_attended(results[-1], expected, mask)
    assert (results[0][0] - results[1][0]).abs().max() > 0.01
    for one, other in zip(results[2], results[3], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["add", "project"])
def test_a_low_precision_stream_gets_one_rounding_of_a_float32_term(
    checkpoint: Path, dtype: str, op: str
) -> None:
    lalm = load_lalm(checkpoint, dtype=dtype)
    edit, ids = edit_of(op, Site.BLOCK_OUTPUT, Positions.ALL), torch.tensor([[10, 11, 12]])
    with torch.inference_mode(), recorded_block_outputs(lalm.parts) as outputs:
        lalm.parts.decoder(input_ids=ids)
        plain = outputs[1].clone()
        with steered(lalm.model, plan_of(edit)), recorded_block_outputs(lalm.parts) as outputs:
            lalm.parts.decoder(input_ids=ids)
    h = plain.float()
    if isinstance(edit, Add):
        expected = plain + torch.tensor(np.float32(edit.strength) * edit.vector).to(plain.dtype)
    else:
        U = torch.tensor(edit.basis)
        delta = ((h - torch.tensor(edit.mean)) @ U) @ (torch.tensor(np.float32(edit.strength)) * U).T
        expected = plain - delta.to(plain.dtype)
    assert outputs[1].dtype == plain.dtype
    np.testing.assert_array_equal(outputs[1].float(), expected.float())


# ------------------------------------------------------------------------------------------- left as it was


def hooks_of(model: torch.nn.Module) -> list[Any]:
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]


@pytest.fixture
def as_before(lalm: Lalm) -> Iterator[None]:
    mask = padded("left")
    before, hooks = prefill(lalm, mask), hooks_of(lalm.model)
    yield
    for one, other in zip(prefill(lalm, mask), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert hooks_of(lalm.model) == hooks


@pytest.mark.usefixtures("as_before")
def test_the_model_is_left_as_it_was(lalm: Lalm) -> None:
    with steered(lalm.model, plan_of(*(edit_of(*kind) for kind in KINDS))):
        prefill(lalm, padded("left"))
        assert any(
            is_steering(hook) for hooks in hooks_of(lalm.model) for one in hooks for hook in one.values()
        )


@pytest.mark.usefixtures("as_before")
def test_the_model_is_left_as_it_was_after_an_exception(lalm: Lalm) -> None:
    def fail() -> None:
        with steered(lalm.model, plan_of(*(edit_of(*kind) for kind in KINDS))):
            prefill(lalm, padded("left"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()


@pytest.mark.usefixtures("as_before")
def test_the_model_is_left_as_it_was_when_a_plan_does_not_fit(lalm: Lalm) -> None:
    vector = random_vector(WIDTH + 1, seed=0)
    wide = SteeringPlan(WIDTH + 1, LAYERS, (Add(0, vector),))
    with pytest.raises(InputError, match=f"the plan is for width {WIDTH + 1}"), steered(lalm.model, wide):
        raise AssertionError
    deep = SteeringPlan(WIDTH, LAYERS + 1, (Add(0, vector[1:]),))
    with pytest.raises(InputError, match=f"for {LAYERS + 1} decoder blocks"), steered(lalm.model, deep):
        raise AssertionError


def test_a_model_that_is_no_transformers_model_is_refused() -> None:
    model, plan = torch.nn.Linear(2, 2), plan_of(Add(0, random_vector(WIDTH, seed=0)))
    with pytest.raises(UnsupportedError, match="Linear is not a transformers"), steered(model, plan):
        raise AssertionError


def test_plans_nest(lalm: Lalm) -> None:
    first, second = (Add(1, random_vector(WIDTH, seed=seed)) for seed in (0, 1))
    mask = padded("left")
    with steered(lalm.model, plan_of(first)), steered(lalm.model, plan_of(second)):
        nested = prefill(lalm, mask)
    with steered(lalm.model, plan_of(first, second)):
        together = prefill(lalm, mask)
    for one, other in zip(nested, together, strict=True):
        np.testing.assert_array_equal(one, other)


class TupleCached(torch.nn.Module):
    """A decoder whose cache is a tuple of keys and values per block, as code outside of transformers keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm, self.head = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()

    def forward(self, *, inputs_embeds: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        return self.norm(self.block(inputs_embeds))


def test_tokens_are_counted_behind_a_cache_of_tuples() -> None:
    model = TupleCached()
    parts = DecoderParts(model, (model.block,), model.norm, model.head, hidden_size=2)
    edit = Add(0, np.ones(2, dtype=np.float32), positions=Positions.range(3, 4))
    keys = torch.zeros(1, 1, 3, 2)
    with steered(parts, SteeringPlan(2, 1, [edit])):
        assert not model(inputs_embeds=torch.zeros(1, 3, 2)).any()
        fourth = model(inputs_embeds=torch.zeros(1, 1, 2), past_key_values=((keys, keys),))
        np.testing.assert_array_equal(fourth, np.ones((1, 1, 2)))
