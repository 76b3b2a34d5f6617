"""Every foreign graph, unsteered, does what its PyTorch model does: the fixtures themselves are proven.

Compared are logits, keys and values of attended tokens in prefill and in one cached decode step, under every
padding that the graph supports.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from tests.foreign.cases import CASES, FLOAT32_ATOL, FOREIGN, ForeignGraph, Outputs, Pass, Rotary

MAX_COMMITTED_BYTES = 4_000_000


@dataclasses.dataclass(frozen=True)
class Step:
    """A pass, and what the graph and the PyTorch model answer."""

    feed: Pass
    graph: Outputs
    eager: Outputs


def steps(foreign: ForeignGraph, padding: str) -> list[Step]:
    """Prefill, and decode from the caches of the prefill: each side's own."""
    prefill, decode = foreign.sessions
    first = foreign.first(padding)
    graph, eager = foreign.run(prefill, first), foreign.eager(first)
    ours, theirs = foreign.next(first, graph.presents), foreign.next(first, eager.presents)
    return [
        Step(first, graph, eager),
        Step(theirs, foreign.run(decode, ours), foreign.eager(theirs)),
    ]


def paddings(foreign: ForeignGraph) -> tuple[str, ...]:
    """What is tested; a graph of `GroupQueryAttention` has no left padding."""
    expected = {"none", "right"} if foreign.case.rotary is Rotary.LENGTHS else {"none", "left", "right"}
    assert set(foreign.case.paddings) == expected
    return foreign.case.paddings


def difference(foreign: ForeignGraph, step: Step) -> float:
    """The largest deviation in logits, keys and values of attended tokens."""
    attended_BS = step.feed.attended
    assert step.graph.logits.shape == step.eager.logits.shape
    found = [np.abs(step.graph.logits - step.eager.logits)[attended_BS].max()]
    for got, expected in zip(step.graph.presents, step.eager.presents, strict=True):
        columns = (
            foreign.attended(step.feed, got, graph=True),
            foreign.attended(step.feed, expected, graph=False),
        )
        assert columns[0].shape == columns[1].shape
        found.append(np.abs(columns[0] - columns[1]).max())
    return float(max(found))


def test_the_graph_equals_its_pytorch_model(foreign: ForeignGraph) -> None:
    for padding in paddings(foreign):
        for step in steps(foreign, padding):
            assert difference(foreign, step) <= foreign.case.atol


def test_a_second_chunk_of_a_prompt_equals_too(foreign: ForeignGraph) -> None:
    """Of one row: `GroupQueryAttention` takes a chunk behind a past for no more."""
    decode = foreign.sessions[1]
    if not foreign.takes_chunks:
        assert foreign.case.name.startswith("transformers_")  # generation pairs: one token a step
        return
    first = foreign.first("none", batch=1)
    chunk = foreign.next(first, foreign.eager(first).presents, sequence=3)
    assert (
        difference(foreign, Step(chunk, foreign.run(decode, chunk), foreign.eager(chunk)))
        <= foreign.case.atol
    )


def test_a_difference_would_be_seen(foreign: ForeignGraph) -> None:
    """The comparison fails for another token, and for a decode step whose cache is not what it should be."""
    prefill, decode = foreign.sessions
    first = foreign.first("none")
    other = dataclasses.replace(first, tokens=first.tokens.flip(0))
    graph, eager = foreign.run(prefill, other), foreign.eager(first)
    assert difference(foreign, Step(first, graph, eager)) > 2 * foreign.case.atol
    step = foreign.next(first, eager.presents)
    emptied = foreign.next(first, [np.zeros_like(present) for present in eager.presents])
    assert (
        difference(foreign, Step(step, foreign.run(decode, emptied), foreign.eager(step)))
        > 2 * foreign.case.atol
    )


@pytest.mark.parametrize(
    "foreign",
    [case for case in CASES if case.rotary is Rotary.LENGTHS],
    ids=lambda case: case.name,
    indirect=True,
)
def test_left_padding_is_beyond_group_query_attention(foreign: ForeignGraph) -> None:
    """Of the mask it reads only how many tokens a row has, and takes them to be the first ones."""
    assert difference(foreign, steps(foreign, "left")[0]) > 0.1


def test_the_graph_is_of_the_kind_it_stands_for(foreign: ForeignGraph) -> None:
    graph = onnx.load(foreign.decode_path)
    operators = {node.op_type for node in graph.graph.node}
    kinds = {
        "genai_int4": {"MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"},
        "genai_phi": {"SkipLayerNormalization", "LayerNormalization", "GroupQueryAttention"},
        "genai_gemma2": {"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"},
        "optimum_merged": {"If"},
        "qdq_static": {"QuantizeLinear", "DequantizeLinear"},
        "qdq_weights": {"DequantizeLinear"},
        "dynamic": {"MatMulInteger", "DynamicQuantizeLinear"},
    }
    assert kinds.get(foreign.case.name, set()) <= operators
    assert bool(graph.functions) == foreign.case.has_functions


def test_tolerances_wider_than_float32_have_a_reason() -> None:
    for case in CASES:
        assert (case.atol > FLOAT32_ATOL) == bool(case.atol_reason)


def test_what_is_committed_stays_small() -> None:
    files = [path for path in FOREIGN.rglob("*") if path.suffix in {".onnx", ".safetensors", ".json"}]
    assert sum(path.stat().st_size for path in files) <= MAX_COMMITTED_BYTES
