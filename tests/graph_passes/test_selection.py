"""A graph selects the positions that the eager model selects, is told strengths at run time, and keeps its promises.

In ONNX Runtime on CPU: prefill, cached decode, left, right and no padding, chunked prefill.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Edit, Positions, Site, SteeringPlan
from calibration.steered import steered
from calibration.token_positions import position_ids
from graph_passes.patch import patch_model
from graph_passes.selection import (
    POSITIONS_INPUT,
    PROMPT_LENGTHS_INPUT,
    STRENGTH_INPUT,
    LastFrom,
    PromptFrom,
    SteeringInputs,
    StrengthInput,
)
from graph_passes.unpatch import unpatch_model
from tests import tiny_lalm
from tests.conftest import SITES, one_edit, padded, plan_of
from tests.decoders import (
    HAND_LAYERS,
    HAND_WIDTH,
    TinyDecoder,
    Variant,
    hand_decoder,
    hand_feeds,
    no_past,
    run_eager,
    run_graph,
    session,
)

WIDTH, LAYERS = tiny_lalm.WIDTH, tiny_lalm.LAYERS
OUTPUT_ATOL = 2e-5
"""float32 sums in another order than PyTorch's: measured at most 3e-6 on logits of magnitude up to 7."""
LEAST_EFFECT = 1e-2
"""What an edit must change somewhere for the comparison to mean anything; 500 times the tolerance."""

KINDS = [
    Positions.LAST,
    Positions.ALL,
    Positions.PROMPT,
    Positions.GENERATED,
    Positions.first(2),
    Positions.range(2, 5),
    Positions.range(4),
]
FED = SteeringInputs(prompt_from=PromptFrom.INPUT)


def edits_at(positions: Positions) -> tuple[Edit, ...]:
    return tuple(
        one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=layer)
        for op, site, layer in (
            ("add", Site.BLOCK_OUTPUT, 0),
            ("project", Site.BLOCK_OUTPUT, 1),
            ("project", Site.BLOCK_INPUT, 0),
            ("add", Site.FINAL_NORM_OUTPUT, 0),
        )
    )


def rollout(padding: str, *, seed: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Prompt lengths (B,), and a prefill and three decode steps as embeddings and masks."""
    generator = torch.Generator().manual_seed(seed)
    mask = padded(padding)
    lengths = mask.sum(1)
    steps = [(torch.randn(*mask.shape, WIDTH, generator=generator), mask)]
    for _ in range(3):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
        steps.append((torch.randn(len(mask), 1, WIDTH, generator=generator), mask))
    return lengths, steps


def compare(
    decoder: TinyDecoder,
    plan: SteeringPlan,
    inputs: SteeringInputs,
    *,
    strength: torch.Tensor | None = None,
    pick: Any = None,
) -> None:
    """Every pass of three rollouts: graph against hooked eager model, and the effect is there in some pass."""
    engine = session(patch_model(decoder.proto, plan, inputs=inputs).model, decoder.path.parent)
    plain = session(decoder.proto, decoder.path.parent)
    effect = 0.0
    for seed, padding in enumerate(("none", "left", "right")):
        lengths, steps = rollout(padding, seed=seed)
        past = no_past(len(lengths))
        with steered(decoder.model, plan, strength=strength):
            for embeds, mask in steps:
                arguments = (embeds, mask, position_ids(mask)[:, -embeds.shape[1] :], past)
                oracle = run_eager(decoder.model, *arguments)
                fed: dict[str, np.ndarray] = {}
                if inputs.prompt_from is PromptFrom.INPUT and any(
                    e.positions.needs_prompt_length for e in plan.edits
                ):
                    fed[PROMPT_LENGTHS_INPUT] = lengths.numpy()
                if strength is not None:
                    fed[STRENGTH_INPUT] = strength.numpy()
                if pick is not None:
                    fed[POSITIONS_INPUT] = pick(mask, embeds.shape[1])
                got = list(run_graph(engine, *arguments, **fed).values())
                attended = mask[:, -embeds.shape[1] :].bool()
                np.testing.assert_allclose(got[0][attended], oracle[0][attended], rtol=0, atol=OUTPUT_ATOL)
                for one, other in zip(got[1:], oracle[1:], strict=True):
                    columns = one.swapaxes(1, 2)[mask.bool()], other.transpose(1, 2)[mask.bool()]
                    np.testing.assert_allclose(*columns, rtol=0, atol=OUTPUT_ATOL)
                unsteered = torch.from_numpy(next(iter(run_graph(plain, *arguments).values())))
                effect = max(effect, float((oracle[0] - unsteered)[attended].abs().max()))
                past = oracle[1:]
    assert effect > LEAST_EFFECT


@pytest.mark.parametrize("positions", KINDS, ids=[kind.value for kind in KINDS])
def test_a_graph_that_is_told_prompt_lengths_selects_as_the_eager_model(
    exported_decoder: TinyDecoder, positions: Positions
) -> None:
    compare(exported_decoder, plan_of(*edits_at(positions)), FED)


def test_every_exporters_graph_selects_all_kinds_at_once(any_decoder: TinyDecoder) -> None:
    compare(any_decoder, plan_of(*(edit for positions in KINDS for edit in edits_at(positions))), FED)


@pytest.mark.parametrize("positions", [Positions.PROMPT, Positions.GENERATED], ids=["prompt", "generated"])
def test_a_pass_without_past_is_the_prompt_where_nobody_says_so(
    exported_decoder: TinyDecoder, positions: Positions
) -> None:
    compare(exported_decoder, plan_of(*edits_at(positions)), SteeringInputs())


def test_the_first_steps_need_prompt_lengths(exported_decoder: TinyDecoder) -> None:
    plan = plan_of(*edits_at(Positions.first(3)))
    with pytest.raises(
        UnsupportedError, match=r"'first:3' need the length of each row's prompt.*--prompt-from input"
    ):
        patch_model(exported_decoder.proto, plan)


@pytest.mark.parametrize("positions", [Positions.PROMPT, Positions.GENERATED, Positions.range(1, 3)])
@pytest.mark.parametrize(("mask", "cache"), [(True, True), (False, True), (False, False)])
def test_tokens_are_counted_without_a_mask_where_rows_are_never_padded(
    positions: Positions, mask: bool, cache: bool, tmp_path: Any
) -> None:
    """From the cache's length or, in a graph without cache, from the pass alone."""
    model, proto = hand_decoder(Variant(mask=mask, cache=cache), tmp_path / "model.onnx")
    edit = one_edit("add", Site.BLOCK_OUTPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=1)
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (edit,))
    everywhere = SteeringPlan(HAND_WIDTH, HAND_LAYERS, (dataclasses.replace(edit, positions=Positions.ALL),))
    columns = SteeringInputs(last_from=LastFrom.SEQUENCE)
    outputs = {}
    feeds = hand_feeds(proto, model.sample(seed=3))
    for name, graph in {
        "plain": proto,
        "chosen": patch_model(proto, plan, inputs=columns).model,
        "everywhere": patch_model(proto, everywhere, inputs=columns).model,
    }.items():
        outputs[name] = session(graph).run(["logits"], feeds)[0]
    past = 3 if cache else 0
    tokens = np.arange(4) + past
    chosen = {
        Positions.PROMPT: np.full(4, past == 0),
        Positions.GENERATED: np.full(4, past > 0),
        Positions.range(1, 3): (tokens >= 1) & (tokens < 3),
    }[positions]
    first = int(np.argmax(chosen)) if chosen.any() else 4
    np.testing.assert_array_equal(outputs["chosen"][:, :first], outputs["plain"][:, :first])
    if chosen.any():
        assert np.abs(outputs["chosen"] - outputs["plain"])[:, first].max() > LEAST_EFFECT
    same = np.allclose(outputs["chosen"], outputs["everywhere"], rtol=0, atol=OUTPUT_ATOL)
    assert same == bool(chosen.all())


# ------------------------------------------------------------------------------------- positions from the outside


def last_attended(mask: torch.Tensor, sequence: int) -> np.ndarray:
    window = mask[:, -sequence:]
    return np.array([int(row.nonzero().max()) for row in window])


def test_a_stack_that_knows_better_says_where_the_last_position_is(any_decoder: TinyDecoder) -> None:
    inputs = SteeringInputs(last_from=LastFrom.INPUT)
    compare(any_decoder, plan_of(*edits_at(Positions.LAST)), inputs, pick=last_attended)


def test_chunks_of_a_prefill_without_a_last_position_are_not_edited(exported_decoder: TinyDecoder) -> None:
    """A prefill in two chunks, the first of which is told that nothing in it is last, equals one in a single pass."""
    plan = plan_of(*edits_at(Positions.LAST))
    inputs = SteeringInputs(last_from=LastFrom.INPUT)
    engine = session(
        patch_model(exported_decoder.proto, plan, inputs=inputs).model, exported_decoder.path.parent
    )
    generator = torch.Generator().manual_seed(4)
    mask = padded("left")
    embeds = torch.randn(*mask.shape, WIDTH, generator=generator)
    places = position_ids(mask)
    whole = run_graph(engine, embeds, mask, places, no_past(3), **{POSITIONS_INPUT: np.array([4, 4, 4])})
    first = run_graph(
        engine,
        embeds[:, :3],
        mask[:, :3],
        places[:, :3],
        no_past(3),
        **{POSITIONS_INPUT: np.array([-1, -1, -1])},
    )
    past = [torch.from_numpy(tensor) for tensor in list(first.values())[1:]]
    second = run_graph(
        engine, embeds[:, 3:], mask, places[:, 3:], past, **{POSITIONS_INPUT: np.array([1, 1, 1])}
    )
    logits = next(iter(whole))
    np.testing.assert_allclose(second[logits][:, -1], whole[logits][:, -1], rtol=0, atol=OUTPUT_ATOL)
    wrong = run_graph(
        engine, embeds[:, 3:], mask, places[:, 3:], past, **{POSITIONS_INPUT: np.array([0, 0, 0])}
    )
    assert np.abs(wrong[logits][:, -1] - whole[logits][:, -1]).max() > LEAST_EFFECT


def test_a_mask_selects_the_end_of_each_chunk(exported_decoder: TinyDecoder) -> None:
    """`last` is the last attended position of a pass: a chunk has one too."""
    plan = plan_of(*edits_at(Positions.LAST))
    engine = session(patch_model(exported_decoder.proto, plan).model, exported_decoder.path.parent)
    generator = torch.Generator().manual_seed(5)
    past = no_past(2)
    with steered(exported_decoder.model, plan):
        for start, stop in ((0, 3), (3, 5)):
            mask = torch.ones(2, stop, dtype=torch.long)
            embeds = torch.randn(2, stop - start, WIDTH, generator=generator)
            arguments = (embeds, mask, position_ids(mask)[:, start:], past)
            oracle = run_eager(exported_decoder.model, *arguments)
            got = list(run_graph(engine, *arguments).values())
            np.testing.assert_allclose(got[0], oracle[0], rtol=0, atol=OUTPUT_ATOL)
            past = oracle[1:]


# ------------------------------------------------------------------------------------------ strength at run time

EVERY_KIND = [
    one_edit(op, site, positions, width=WIDTH, layers=LAYERS, layer=number % LAYERS)
    for number, (op, (site, positions)) in enumerate(itertools.product(("add", "project"), SITES))
]


@pytest.mark.parametrize("kind", [StrengthInput.BATCH, StrengthInput.EDITS])
def test_strengths_are_factors_of_the_plans(any_decoder: TinyDecoder, kind: StrengthInput) -> None:
    plan = plan_of(*EVERY_KIND)
    shape = (3,) if kind is StrengthInput.BATCH else (3, len(plan.edits))
    factors = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factors[1] = 0
    compare(any_decoder, plan, SteeringInputs(strength=kind), strength=factors)


@pytest.mark.parametrize("kind", [StrengthInput.BATCH, StrengthInput.EDITS])
def test_strength_zero_is_bit_equal_for_that_request_and_the_others_do_not_notice(
    any_decoder: TinyDecoder, kind: StrengthInput
) -> None:
    plan = plan_of(*EVERY_KIND)
    parent = any_decoder.path.parent
    fed = session(patch_model(any_decoder.proto, plan, inputs=SteeringInputs(strength=kind)).model, parent)
    baked = session(patch_model(any_decoder.proto, plan).model, parent)
    unsteered = session(any_decoder.proto, parent)
    _, steps = rollout("left", seed=2)
    past = no_past(3)
    width = () if kind is StrengthInput.BATCH else (len(plan.edits),)
    mixed = np.ones((3, *width), dtype=np.float32)
    mixed[1] = 0
    for embeds, mask in steps:
        arguments = (embeds, mask, position_ids(mask)[:, -embeds.shape[1] :], past)
        plainly, full = run_graph(unsteered, *arguments), run_graph(baked, *arguments)
        absent = run_graph(fed, *arguments)
        some = run_graph(fed, *arguments, **{STRENGTH_INPUT: mixed})
        for name, expected in full.items():
            assert absent[name].tobytes() == expected.tobytes()
            assert some[name][[0, 2]].tobytes() == expected[[0, 2]].tobytes()
            assert some[name][1].tobytes() == plainly[name][1].tobytes()
        assert np.abs(full[next(iter(full))] - plainly[next(iter(full))])[1].max() > LEAST_EFFECT
        past = [torch.from_numpy(tensor) for tensor in list(plainly.values())[1:]]


@pytest.mark.parametrize("last_from", LastFrom)
def test_a_strength_may_be_left_out_for_a_whole_batch(
    exported_decoder: TinyDecoder, last_from: LastFrom
) -> None:
    """Its default has one row: no runtime may take that for the batch, whatever else the graph is fed."""
    plan, parent = plan_of(*EVERY_KIND), exported_decoder.path.parent
    inputs = SteeringInputs(last_from, PromptFrom.INPUT, StrengthInput.BATCH)
    fed = session(patch_model(exported_decoder.proto, plan, inputs=inputs).model, parent)
    baked = session(patch_model(exported_decoder.proto, plan).model, parent)
    _, ((embeds, mask), *_) = rollout("left", seed=3)
    arguments = (embeds, mask, position_ids(mask), no_past(3))
    told = {POSITIONS_INPUT: np.array([4, 4, 4])} if last_from is LastFrom.INPUT else {}
    for name, expected in run_graph(baked, *arguments).items():
        np.testing.assert_array_equal(run_graph(fed, *arguments, **told)[name], expected)


@pytest.mark.parametrize("positions", [Positions.PROMPT, Positions.first(2), Positions.range(1, 4)])
def test_tokens_are_counted_by_the_mask_wherever_the_last_position_is_read_from(
    exported_decoder: TinyDecoder, positions: Positions
) -> None:
    compare(
        exported_decoder, plan_of(*edits_at(positions)), SteeringInputs(LastFrom.SEQUENCE, PromptFrom.INPUT)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strength_in_half_precision_is_scaled_in_float32_and_cast_once(
    dtype: torch.dtype, tmp_path: Any
) -> None:
    model, proto = hand_decoder(Variant(dtype=dtype), tmp_path / "model.onnx")
    edits = [
        one_edit(op, Site.BLOCK_OUTPUT, positions, width=HAND_WIDTH, layers=HAND_LAYERS, layer=2)
        for op in ("add", "project")
        for positions in (Positions.LAST, Positions.ALL)
    ]
    plan = SteeringPlan(HAND_WIDTH, HAND_LAYERS, tuple(edits))
    feeds = hand_feeds(proto, model.sample(seed=3))
    halved = dataclasses.replace(
        plan, edits=tuple(dataclasses.replace(edit, strength=edit.strength / 2) for edit in plan.edits)
    )
    fed = patch_model(proto, plan, inputs=SteeringInputs(strength=StrengthInput.BATCH)).model

    def logits(graph: onnx.ModelProto, **strength: np.ndarray) -> np.ndarray:
        # ONNX Runtime's CPU provider computes float16 in float32 and leaves out the rounding between two casts.
        return ReferenceEvaluator(graph).run(["logits"], {**feeds, **strength})[0]

    half = logits(fed, **{STRENGTH_INPUT: np.full(2, 0.5, dtype=np.float32)})
    np.testing.assert_array_equal(
        half, logits(patch_model(proto, halved).model)
    )  # halving is exact in every float
    assert (half != logits(patch_model(proto, plan).model)).any()


def test_an_input_of_that_name_is_refused(exported_decoder: TinyDecoder) -> None:
    taken = onnx.ModelProto()
    taken.CopyFrom(exported_decoder.proto)
    taken.graph.input.append(onnx.ValueInfoProto(name=STRENGTH_INPUT))
    with pytest.raises(InputError, match=f"a tensor '{STRENGTH_INPUT}' of its own"):
        patch_model(taken, plan_of(*EVERY_KIND), inputs=SteeringInputs(strength=StrengthInput.BATCH))


def test_strength_that_may_be_left_out_needs_a_newer_file(exported_decoder: TinyDecoder) -> None:
    old = onnx.ModelProto()
    old.CopyFrom(exported_decoder.proto)
    old.ir_version = 3
    with pytest.raises(UnsupportedError, match="IR version is 3"):
        patch_model(old, plan_of(*EVERY_KIND), inputs=SteeringInputs(strength=StrengthInput.BATCH))


# ------------------------------------------------------------------------------------------------------- unpatch


@pytest.mark.parametrize(
    "inputs",
    [
        SteeringInputs(),
        SteeringInputs(LastFrom.INPUT, PromptFrom.INPUT, StrengthInput.BATCH),
        SteeringInputs(LastFrom.SEQUENCE, PromptFrom.PAST, StrengthInput.EDITS),
    ],
    ids=["baked", "fed", "fed per edit"],
)
def test_unpatching_gives_back_the_graph_field_by_field(
    any_decoder: TinyDecoder, inputs: SteeringInputs
) -> None:
    plan = plan_of(*EVERY_KIND, *edits_at(Positions.PROMPT), *edits_at(Positions.range(1, 4)))
    before = any_decoder.proto
    steered_model = patch_model(before, plan, inputs=inputs).model
    assert steered_model != before
    assert unpatch_model(steered_model) == before
    with pytest.raises(InputError, match="holds no steering to take out"):
        unpatch_model(before)
