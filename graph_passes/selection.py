"""What the edits of one graph share: masks of the positions they act at, and factors of their strengths.

Computed once per graph (and once per body of an `If`), from the attention mask and the shape of the stream. The
result names the shared tensors for every edit; `graph_passes/lowering.py` reads them.
Dimensions: B batch, S sequence of this forward pass, T past and present, D width, E edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from calibration.errors import UnsupportedError
from calibration.plan import Edit, PositionKind, Positions, Project
from graph_passes.builder import Builder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POSITIONS_INPUT = "steering_positions"
"""Graph input int64 (B,): the last position of each row in this pass; negative where there is none."""
PROMPT_LENGTHS_INPUT = "steering_prompt_lengths"
"""Graph input int64 (B,): attended prompt tokens of each row, past included."""
STRENGTH_INPUT = "steering_strength"
"""Graph input float32 (B,) or (B, E): factors of the plan's strengths; 1 where it is not fed."""
LAST_NODE = "sarsteer.last.last"
"""The node that computes the last position of each row; a subtraction where that is the last column."""
INT64_MAX = np.iinfo(np.int64).max
REDUCE_AXES_INPUT_OPSET = 18
"""From this opset on ReduceMax takes its axes as an input; before, as an attribute."""


class LastFrom(str, Enum):
    """Where a graph learns which position is the last of each row."""

    ATTENTION_MASK = "attention_mask"
    SEQUENCE = "sequence"
    INPUT = "input"


class PromptFrom(str, Enum):
    """Where a graph learns which tokens are the prompt: a pass without past, or lengths that it is fed."""

    PAST = "past"
    INPUT = "input"


class StrengthInput(str, Enum):
    """What a fed strength is a factor of: all edits of a row, or each by itself."""

    BATCH = "batch"
    EDITS = "edits"


@dataclass(frozen=True)
class SteeringInputs:
    """What a steered graph is told at run time, and what it finds out for itself.

    `strength`: None bakes the plan's strengths in.
    """

    last_from: LastFrom = LastFrom.ATTENTION_MASK
    prompt_from: PromptFrom = PromptFrom.PAST
    strength: StrengthInput | None = None


@dataclass(frozen=True)
class Selection:
    """Where one edit acts in this pass, and how strongly; None stands for everywhere and for as planned.

    `mask`: bool, broadcast to (B, S, 1). `row`: int64 (B, 1, 1), the one position a row is edited at, where
    there is at most one. `factor`: float32 (B, 1, 1); where it is 0 the mask is false.
    """

    mask: gs.Variable | None = None
    row: gs.Variable | None = None
    factor: gs.Variable | None = None


@dataclass(frozen=True)
class Shared:
    """The shared nodes in order, and the selection of every edit."""

    nodes: tuple[gs.Node, ...]
    selections: tuple[Selection, ...]


@dataclass(frozen=True)
class Around:
    """What of the graph selections are computed from.

    `hidden`: any stream tensor (B, S, D), read for its shape alone. `attention_mask`: (B, T), its last S columns
    are this pass; or None. `cache`: a graph input (B, H, P, W) whose P tells the past where there is no mask.
    """

    hidden: gs.Variable
    attention_mask: gs.Variable | None
    cache: gs.Variable | None
    opset: int


def share(edits: Sequence[Edit], inputs: SteeringInputs, around: Around) -> Shared:
    """Build what the edits of a plan share.

    Raises `UnsupportedError` when the graph lacks what `inputs` asks to read positions from.
    """
    building = _Sharing(inputs, around)
    selections = tuple(building.select(number, edit) for number, edit in enumerate(edits))
    return Shared(tuple(building.nodes), selections)


class _Sharing:
    """Builds each shared tensor when it is first asked for."""

    def __init__(self, inputs: SteeringInputs, around: Around) -> None:
        self._inputs, self._around = inputs, around
        self._built: dict[str, gs.Variable] = {}
        self.nodes: list[gs.Node] = []

    def select(self, number: int, edit: Edit) -> Selection:
        """The selection of one edit."""
        positions = edit.positions
        mask = None if positions == Positions.ALL else self._once(_slug(positions), self._mask, positions)
        row = None
        if positions == Positions.LAST and isinstance(edit, Project):
            row = self._once("sarsteer.last.row", self._row)
        if self._inputs.strength is None:
            return Selection(mask, row)
        which = "" if self._inputs.strength is StrengthInput.BATCH else f".{number}"
        factor = self._once(f"sarsteer.strength{which}", self._factor, number)
        return Selection(self._active(mask, factor, f"{_slug(positions)}.active{which}"), row, factor)

    def _once(self, key: str, build: Callable[..., gs.Variable], *arguments: object) -> gs.Variable:
        if key not in self._built:
            self._built[key] = build(*arguments)
        return self._built[key]

    def _builder(self, name: str) -> Builder:
        return Builder(name, self.nodes)

    # --------------------------------------------------------------------------------- positions of this pass

    def _sequence_length(self) -> gs.Variable:
        """S, int64 (1,)."""
        build = self._builder("sarsteer.pass")
        shape = build.node("Shape", "shape", [self._around.hidden], np.int64)
        bounds = [build.integers(key, [at]) for key, at in (("from", 1), ("to", 2), ("axis", 0))]
        return build.node("Slice", "sequence", [shape, *bounds], np.int64)

    def _pass_positions(self) -> gs.Variable:
        """0 to S − 1, int64 (S,)."""
        build = self._builder("sarsteer.pass")
        sequence = build.node("Squeeze", "length", [self._once("S", self._sequence_length)], np.int64)
        zero, one = build.integers("zero", 0), build.integers("one", 1)
        return build.node("Range", "positions", [zero, sequence, one], np.int64)

    def _window(self, key: str, columns_BT: gs.Variable) -> gs.Variable:
        """The last S columns of (B, T)."""
        build = self._builder("sarsteer.pass")
        start = build.node("Neg", f"{key}_start", [self._once("S", self._sequence_length)], np.int64)
        end, axis = build.integers(f"{key}_end", [INT64_MAX]), build.integers(f"{key}_axis", [1])
        return build.node("Slice", key, [columns_BT, start, end, axis], np.int64)

    def _attended(self) -> gs.Variable:
        """Which positions of this pass are attended to, bool (B, S)."""
        window_BS = self._window("window", self._required_mask())
        return self._builder("sarsteer.pass").node(
            "Cast", "attended", [window_BS], np.bool_, to=TensorProto.BOOL
        )

    def _required_mask(self) -> gs.Variable:
        if self._around.attention_mask is None:
            raise UnsupportedError(
                "the graph has no input 'attention_mask' [batch, past + sequence] to find the last position of "
                "each row from; if rows are never padded on the right, use --last-from sequence"
            )
        return self._around.attention_mask

    @property
    def _counts_columns(self) -> bool:
        """Whether there is no mask to count attended tokens by, so that columns are tokens."""
        return self._around.attention_mask is None

    # --------------------------------------------------------------------------------------- the last position

    def _last(self) -> gs.Variable:
        """The last position of each row in this pass, int64 (B, 1) or (1,); below 0 where there is none."""
        build = self._builder("sarsteer.last")
        if self._inputs.last_from is LastFrom.INPUT:
            fed = self._once(POSITIONS_INPUT, gs.Variable, POSITIONS_INPUT, np.int64)
            return build.node("Unsqueeze", "last", [fed, build.integers("as_sequence", [1])], np.int64)
        if self._inputs.last_from is LastFrom.SEQUENCE:
            return build.node(
                "Sub", "last", [self._once("S", self._sequence_length), build.integers("back", [1])], np.int64
            )
        attended_BS = self._once("attended", self._attended)
        positions_S = self._once("positions", self._pass_positions)
        none = build.integers("none", -1)
        scored_BS = build.node("Where", "scored", [attended_BS, positions_S, none], np.int64)
        if self._around.opset >= REDUCE_AXES_INPUT_OPSET:
            return build.node(
                "ReduceMax", "last", [scored_BS, build.integers("columns", [1])], np.int64, keepdims=1
            )
        return build.node("ReduceMax", "last", [scored_BS], np.int64, axes=[1], keepdims=1)

    def _row(self) -> gs.Variable:
        """The last position as an index, int64 (B, 1, 1); 0 where there is none: what is read there is not used."""
        build = self._builder("sarsteer.last")
        last_B1 = self._once("last", self._last)
        found_B1 = build.node("Max", "found", [last_B1, build.integers("at_least", [0])], np.int64)
        if self._inputs.last_from is not LastFrom.SEQUENCE:
            return build.node("Unsqueeze", "row", [found_B1, build.integers("row_axis", [2])], np.int64)
        batch = [
            build.integers(key, [at]) for key, at in (("batch_from", 0), ("batch_to", 1), ("batch_axis", 0))
        ]
        shape = build.node("Shape", "stream_shape", [self._around.hidden], np.int64)
        batch_1 = build.node("Slice", "batch", [shape, *batch], np.int64)
        rows = build.node("Concat", "rows", [batch_1, build.integers("ones", [1, 1])], np.int64, axis=0)
        return build.node("Expand", "row", [found_B1, rows], np.int64)

    # ------------------------------------------------------------------------------------------ numbered tokens

    def _token_numbers(self) -> gs.Variable:
        """The number of each token in its row, int64 (B, S), or (S,) where rows are never padded."""
        build = self._builder("sarsteer.token")
        if self._counts_columns:
            positions_S, past_1 = (
                self._once("positions", self._pass_positions),
                self._once("past", self._past_length),
            )
            return build.node("Add", "number", [positions_S, past_1], np.int64)
        mask_BT = build.node("Cast", "mask", [self._required_mask()], np.int64, to=TensorProto.INT64)
        counted_BT = build.node("CumSum", "counted", [mask_BT, build.integers("along", 1)], np.int64)
        window_BS = self._window("counts", counted_BT)
        return build.node("Sub", "number", [window_BS, build.integers("from_zero", 1)], np.int64)

    def _past_length(self) -> gs.Variable:
        """P, int64 (1,): T − S or, without a mask, an axis of the cache."""
        build = self._builder("sarsteer.past")
        mask, cache = self._around.attention_mask, self._around.cache
        if mask is None and cache is None:
            return build.node(
                "Sub", "length", [self._once("S", self._sequence_length)] * 2, np.int64
            )  # no past: 0
        shape = build.node("Shape", "shape", [cache if mask is None else mask], np.int64)
        at = 2 if mask is None else 1
        bounds = [build.integers(key, [n]) for key, n in (("from", at), ("to", at + 1), ("axis", 0))]
        length = build.node("Slice", "past" if mask is None else "total", [shape, *bounds], np.int64)
        if mask is None:
            return length
        return build.node("Sub", "length", [length, self._once("S", self._sequence_length)], np.int64)

    def _prompt_lengths(self) -> gs.Variable:
        """Prompt tokens of each row, int64 (B, 1) or (1,)."""
        build = self._builder("sarsteer.prompt_length")
        if self._inputs.prompt_from is PromptFrom.INPUT:
            fed = self._once(PROMPT_LENGTHS_INPUT, gs.Variable, PROMPT_LENGTHS_INPUT, np.int64)
            return build.node("Unsqueeze", "given", [fed, build.integers("as_sequence", [1])], np.int64)
        zero = build.integers("zero", [0])
        is_prompt = build.node("Equal", "is_prompt", [self._once("past", self._past_length), zero], np.bool_)
        return build.node(
            "Where", "inferred", [is_prompt, build.integers("all", [INT64_MAX]), zero], np.int64
        )

    def _mask(self, positions: Positions) -> gs.Variable:
        """Where `positions` are in this pass: bool (B, S, 1), or (1, S, 1) where rows are never padded."""
        build = self._builder(_slug(positions))
        if positions == Positions.LAST:
            last_B1, positions_S = (
                self._once("last", self._last),
                self._once("positions", self._pass_positions),
            )
            marked = build.node("Equal", "is_last", [positions_S, last_B1], np.bool_)
            flat = self._inputs.last_from is LastFrom.SEQUENCE
        else:
            marked = self._between(positions, build)
            flat = self._counts_columns and not (
                positions.needs_prompt_length and self._inputs.prompt_from is PromptFrom.INPUT
            )
        axes = build.integers("axes", [0, 2] if flat else [2])
        return build.node("Unsqueeze", "mask", [marked, axes], np.bool_)

    def _between(self, positions: Positions, build: Builder) -> gs.Variable:
        """Attended tokens from a first to a last number: bool (B, S), or (S,) where rows are never padded."""
        token = self._once("token", self._token_numbers)
        start, stop = self._bounds(positions, build)
        terms = [] if self._counts_columns else [self._once("attended", self._attended)]
        if start is not None:
            terms.append(build.node("GreaterOrEqual", "from_start", [token, start], np.bool_))
        if stop is not None:
            terms.append(build.node("Less", "before_stop", [token, stop], np.bool_))
        marked = terms[0]
        for number, term in enumerate(terms[1:]):
            marked = build.node("And", f"both{number}", [marked, term], np.bool_)
        return marked

    def _bounds(self, positions: Positions, build: Builder) -> tuple[gs.Tensor | None, gs.Tensor | None]:
        if positions.kind is PositionKind.RANGE:
            stop = None if positions.stop is None else build.integers("stop", [positions.stop])
            return build.integers("start", [positions.start]), stop
        if positions.kind is PositionKind.FIRST and self._inputs.prompt_from is PromptFrom.PAST:
            raise UnsupportedError(
                f"positions {positions.value!r} need the length of each row's prompt, which a decode step cannot "
                "tell from its past; use --prompt-from input"
            )
        prompt_B1 = self._once("prompt_length", self._prompt_lengths)
        if positions.kind is PositionKind.PROMPT:
            return None, prompt_B1
        if positions.kind is PositionKind.GENERATED:
            return prompt_B1, None
        start_B1 = build.node("Sub", "start", [prompt_B1, build.integers("back", [1])], np.int64)
        steps = build.integers("steps", [positions.stop or 0])
        return start_B1, build.node("Add", "stop", [start_B1, steps], np.int64)

    # ------------------------------------------------------------------------------------------------- strength

    def _factor(self, number: int) -> gs.Variable:
        """The factor of an edit's strength, float32 (B, 1, 1)."""
        per_edit = self._inputs.strength is StrengthInput.EDITS
        build = self._builder(f"sarsteer.strength.{number}" if per_edit else "sarsteer.strength")
        fed = self._once(STRENGTH_INPUT, gs.Variable, STRENGTH_INPUT, np.float32)
        if per_edit:
            fed = build.node("Gather", "column", [fed, build.integers("edit", number)], np.float32, axis=1)
        return build.node("Unsqueeze", "factor", [fed, build.integers("axes", [1, 2])], np.float32)

    def _active(self, mask: gs.Variable | None, factor: gs.Variable, name: str) -> gs.Variable:
        """The mask, false in rows whose factor is 0."""
        if name not in self._built:
            build = self._builder(name)
            zero = build.constant("zero", np.array(0, dtype=np.float32))
            is_zero = build.node("Equal", "is_zero", [factor, zero], np.bool_)
            active = build.node("Not", "nonzero", [is_zero], np.bool_)
            self._built[name] = (
                active if mask is None else build.node("And", "mask", [mask, active], np.bool_)
            )
        return self._built[name]


def _slug(positions: Positions) -> str:
    return f"sarsteer.{positions.value.replace(':', '_')}"
