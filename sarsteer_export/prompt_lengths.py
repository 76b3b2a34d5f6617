"""Whether an engine's profiles admit what a build will ask it: prompts are measured before engines are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.lalm import Lalm, encode_requests
from calibration.states import heard_clips
from engines.input_roles import BATCH, PAST, SEQUENCE, TOTAL, GraphInputs
from engines.profiles import tightest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibration.requests import SpokenRequest
    from engines.sidecar import Binding, Profile


@dataclass(frozen=True)
class Asked:
    """Requests that an engine will answer: `rows` at once, `steps` cached decode steps behind each prompt."""

    requests: Sequence[SpokenRequest]
    rows: int
    steps: int


def check_prompts(
    lalm: Lalm, asked: Sequence[Asked], inputs: Sequence[Binding], profiles: Sequence[Profile]
) -> None:
    """Raise `InputError` naming the longest request whose prompt, or answer, no profile of a decoder admits."""
    for batch in asked:
        lengths = [prompt_length(lalm, request) for request in batch.requests]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows, length = min(batch.rows, len(lengths)), lengths[longest]
        last = [(1, length + batch.steps - 1)] if batch.steps else []
        for sequence, past in [(length, 0), *last]:
            try:
                tightest(profiles, _shapes(inputs, rows, sequence, past))
            except InputError as error:
                raise InputError(
                    f"request {batch.requests[longest].audio}: its prompt is the longest, {length} positions, and "
                    f"{batch.steps} more are decoded behind it, {rows} requests at once; {error}"
                ) from None


def prompt_length(lalm: Lalm, request: SpokenRequest) -> int:
    """Positions of a request's prompt, audio embeddings included."""
    encoded = encode_requests(lalm, [request.text], heard_clips(lalm, [request]))
    return int(encoded["input_ids"].shape[1])


def _shapes(inputs: Sequence[Binding], rows: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one pass through a decoder."""
    sizes = {BATCH: rows, SEQUENCE: sequence, PAST: past, TOTAL: past + sequence}
    graph = GraphInputs.of(inputs)
    return {
        name: tuple(
            int(dim) if role is None else sizes[role]
            for dim, role in zip(binding.dims, graph.roles[name], strict=True)
        )
        for name, binding in graph.inputs.items()
    }
