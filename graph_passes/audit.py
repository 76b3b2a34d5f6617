"""`audit`: whether a graph holds a plan, completely and unaltered, read back from the graph alone.

Neither names nor metadata are trusted. The plan is lowered again by the functions that insertion uses; the steps that
stand on the residual stream (`graph_passes/steps.py`) are compared with it as expressions. Then the wiring: nothing
that the stream feeds may be reached past an edit.

What no comparison with a plan can tell is whether the model's own weights, biases included, are the original's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from calibration.errors import SiteNotFoundError
from calibration.plan import Add, Positions, Site, SteeringPlan, check_plan_fits
from graph_passes.audit_report import AuditedEdit, AuditReport, Finding, FoundStep
from graph_passes.expressions import Constants, Expressions, Leaves, digest_of
from graph_passes.graph_index import describe
from graph_passes.insertion import by_anchor, opset_of
from graph_passes.lowering import StreamType, lower, scaled_vector
from graph_passes.names import edit_names
from graph_passes.plan_names import PLAN_KEY, metadata
from graph_passes.residual_stream import ResidualStream, cache_inputs, find_residual_stream
from graph_passes.scopes import Scope, decoder_scopes
from graph_passes.selection import (
    POSITIONS_INPUT,
    PROMPT_LENGTHS_INPUT,
    STRENGTH_INPUT,
    Around,
    LastFrom,
    PromptFrom,
    SteeringInputs,
    StrengthInput,
    share,
)
from graph_passes.steps import Step, SteppedGraph, shown
from graph_passes.wiring import odd_sums, past, sums_between

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

HIDDEN = "the stream before this step"
MAX_PATHS = 16
"""More chains of steps than this behind one tensor of the stream are not told apart."""


@dataclass(frozen=True)
class _Signature:
    """What a step does to whatever it is given: the operator, its change as an expression, the constants in that."""

    op: str
    change: str
    constants: tuple[NDArray[Any], ...] = field(compare=False, default=())


@dataclass(frozen=True)
class _Stage:
    """A tensor of the stream: what the model computes there, in words, and which blocks it comes before."""

    tensor: str
    place: str
    depth: int


def audit_model(
    model: ModelProto,
    plan: SteeringPlan | None = None,
    *,
    folder: Path | None = None,
    last_from: LastFrom | None = None,
) -> AuditReport:
    """Compare what stands on the residual stream of a graph with a plan; `model` is left as it is.

    `folder`: where the graph's external data lies. `last_from`: where the last position must be read from; when left
    out, from the graph's input for it where it has one, else from its attention mask, else from the last column.
    Without a plan, only what stands there is listed. Raises `SiteNotFoundError` when the graph is no decoder that
    steering can be found in, `InputError` when the plan is for another shape of model.
    """
    opset = opset_of(model)
    reports = [
        _ScopeAudit(model, scope, plan, opset, folder, last_from).report() for scope in decoder_scopes(model)
    ]
    claimed = metadata(model).get(PLAN_KEY)
    notes = [
        f"the file says that it is steered by plan {claimed[:12]}" if claimed else "the file names no plan"
    ]
    if plan is not None and claimed and claimed != plan.digest():
        notes[0] += f", not by {plan.digest()[:12]}"
    for report in reports:
        notes += [note for note in report.notes if note not in notes]
    return AuditReport(
        edits=tuple(edit for report in reports for edit in report.edits),
        steps=tuple(step for report in reports for step in report.steps),
        unexpected=tuple(dict.fromkeys(text for report in reports for text in report.unexpected)),
        notes=tuple(notes),
        plan_sha256=None if plan is None else plan.digest(),
    )


class _ScopeAudit:
    """The audit of one graph, or one body of an `If`."""

    def __init__(
        self,
        model: ModelProto,
        scope: Scope,
        plan: SteeringPlan | None,
        opset: int,
        folder: Path | None,
        last_from: LastFrom | None,
    ) -> None:
        self._scope, self._plan, self._opset = str(scope), plan, opset
        self._graph = SteppedGraph(scope.view(model), opset, folder)
        self._stream = find_residual_stream(self._graph.without_steps())
        self._stages = _stages(self._stream)
        self._inputs = self._steering_inputs(last_from)
        self._unexpected: list[str] = []
        self._notes: list[str] = []
        self._findings: dict[int, tuple[Finding, str]] = {}
        self._stream_tensors = self._of_stream_shape()

    def report(self) -> AuditReport:
        """Compare every tensor of the stream."""
        numbers: dict[str, list[int]] = {}
        if self._plan is not None:
            check_plan_fits(
                self._plan, hidden_size=self._stream.hidden_size, num_layers=len(self._stream.blocks)
            )
            numbers = self._numbers(self._plan)
            self._expected = self._lowered(self._plan, self._inputs)
        for stage in self._stages:
            self._compare(stage, numbers.get(stage.tensor, []))
        for step in self._inside_steps():
            self._unexpected.append(f"{step.what} stands {step.place}, where no edit can ({step.node})")
        self._check_defaults()
        return AuditReport(
            edits=self._edits(),
            steps=tuple(self._found_steps()),
            unexpected=tuple(f"{text}{self._in_scope}" for text in self._unexpected),
            notes=tuple(self._notes),
        )

    # ------------------------------------------------------------------------------------------ what there should be

    def _steering_inputs(self, last_from: LastFrom | None) -> SteeringInputs:
        """What the graph's inputs say that it is told at run time."""
        if last_from is None:
            if POSITIONS_INPUT in self._graph.inputs:
                last_from = LastFrom.INPUT
            else:
                last_from = LastFrom.ATTENTION_MASK if self._stream.attention_mask else LastFrom.SEQUENCE
        prompt_from = PromptFrom.INPUT if self._counts_from_input else PromptFrom.PAST
        strength = None
        for value in self._graph.model.graph.input:
            if value.name == STRENGTH_INPUT:
                ranks = len(value.type.tensor_type.shape.dim)
                strength = StrengthInput.BATCH if ranks == 1 else StrengthInput.EDITS
        return SteeringInputs(last_from, prompt_from, strength)

    @property
    def _counts_from_input(self) -> bool:
        first = self._plan is not None and any(
            edit.positions.value.startswith("first") for edit in self._plan.edits
        )
        return first or PROMPT_LENGTHS_INPUT in self._graph.inputs

    def _numbers(self, plan: SteeringPlan) -> dict[str, list[int]]:
        """Edits per stream tensor; those at a final norm that the graph has not are missing at once."""
        if self._stream.final_norm_output is not None:
            return by_anchor(self._stream, plan)
        lost = [n for n, edit in enumerate(plan.edits) if edit.site is Site.FINAL_NORM_OUTPUT]
        for number in lost:
            self._findings[number] = (Finding.MISSING, "the graph has no final norm over every position")
        stream = replace(self._stream, final_norm_output="")
        return {tensor: numbers for tensor, numbers in by_anchor(stream, plan).items() if tensor}

    def _lowered(self, plan: SteeringPlan, inputs: SteeringInputs) -> list[_Signature]:
        """The signature of every edit, from the nodes that insertion would make."""
        caches = cache_inputs(self._graph.index)
        mask = self._stream.attention_mask
        around = Around(
            hidden=gs.Variable(HIDDEN),
            attention_mask=None if mask is None else gs.Variable(mask),
            cache=gs.Variable(caches[0]) if caches else None,
            opset=self._opset,
        )
        shared = share(plan.edits, inputs, around)
        nodes, outputs = list(shared.nodes), []
        types = self._types(plan)
        for number, (edit, name) in enumerate(zip(plan.edits, edit_names(plan.edits), strict=True)):
            hidden = gs.Variable(f"{HIDDEN} {number}", dtype=types[number].numpy_dtype)
            lowered = lower(edit, name, hidden, types[number], shared.selections[number])
            nodes += lowered.nodes
            outputs.append(lowered.output.name)
        computed = {id(tensor) for node in nodes for tensor in node.outputs}
        given = {
            tensor.name: tensor
            for node in nodes
            for tensor in node.inputs
            if id(tensor) not in computed and not isinstance(tensor, gs.Constant)
        }
        exported = gs.export_onnx(
            gs.Graph(nodes=nodes, inputs=list(given.values()), opset=self._opset), do_type_check=False
        ).graph
        constants = Constants({tensor.name: tensor for tensor in exported.initializer})
        known = {name: self._graph.inputs.get(name, 0) for name in given}
        expressions = Expressions(list(exported.node), constants, known, self._opset)
        last = {node.output[0]: node for node in exported.node}
        return [
            _signature(
                expressions, last[output].op_type, last[output].input[0], last[output].input[1], [HIDDEN]
            )
            for output in outputs
        ]

    def _types(self, plan: SteeringPlan) -> list[StreamType]:
        """The element type of the stream at every edit."""
        lost = self._stream.final_norm_output is None
        return [
            StreamType(
                self._stream.elem_type
                if lost and edit.site is Site.FINAL_NORM_OUTPUT
                else self._stream.elem_type_of(self._stream.tensor(edit.site, edit.layer))
            )
            for edit in plan.edits
        ]

    # --------------------------------------------------------------------------------------------- what there is

    def _of_stream_shape(self) -> set[str]:
        """The tensors that have the shape of the stream: those before blocks, what they are cast from, steps."""
        tensors: set[str] = set()
        for stage in self._stages:
            tensors.add(stage.tensor)
            for chain in self._chains(stage.tensor):
                tensors |= {step.output for step in chain}
        start = self._stages[0].tensor
        while (node := self._graph.index.producer_of(start)) is not None and node.op_type in (
            "Cast",
            "Identity",
        ):
            start = node.input[0]
            tensors.add(start)
        return tensors | {self._graph.expressions.root(tensor) for tensor in tensors}

    def _chains(self, tensor: str) -> list[list[Step]]:
        """Every chain of steps behind a tensor of the stream, to its end; one empty chain where there is none."""
        chains: list[list[Step]] = []
        stack: list[list[Step]] = [[]]
        while stack and len(chains) < MAX_PATHS:
            chain = stack.pop()
            behind = self._graph.expressions.root(chain[-1].output if chain else tensor)
            steps = self._graph.after.get(behind, [])
            stack += [[*chain, step] for step in steps]
            if not steps:
                chains.append(chain)
        return chains or [[]]

    def _signed(self, step: Step) -> _Signature:
        op = step.node.op_type if step.is_straight else f"{step.node.op_type} to a view"
        return _signature(self._graph.expressions, op, step.hidden, step.change, self._stream_tensors)

    def _found_steps(self) -> list[FoundStep]:
        found = []
        for stage in self._stages:
            seen: set[str] = set()
            for step in (step for chain in self._chains(stage.tensor) for step in chain):
                if step.output not in seen and not self._is_own(step, stage):
                    seen.add(step.output)
                    what, node = _words(self._signed(step)), shown(describe(step.node))
                    found.append(FoundStep(stage.place, what, node, self._scope))
        return [*found, *self._inside_steps()]

    def _inside_steps(self) -> list[FoundStep]:
        """What is done to the stream between its blocks' ends, besides the blocks' own residual adds."""
        found = []
        for before, after in pairwise(self._stages):
            if after.place == _FINAL_NORM:
                continue
            place = f"inside block {before.depth}"
            starts = {before.tensor} | {
                step.output for chain in self._chains(before.tensor) for step in chain
            }
            sums = sums_between(self._graph, starts, after.tensor)
            for tensor in sorted(sums - starts - {after.tensor}):
                for step in self._graph.after.get(self._graph.expressions.root(tensor), []):
                    if not step.is_own_bias:
                        what = _words(self._signed(step))
                        found.append(FoundStep(place, what, shown(describe(step.node)), self._scope))
            found += [
                FoundStep(place, "an addition that is no residual add", shown(describe(node)), self._scope)
                for node in odd_sums(self._graph, starts | sums - {after.tensor}, sums)
            ]
        return list(dict.fromkeys(found))

    def _is_own(self, step: Step, stage: _Stage) -> bool:
        """Whether a step may be the model's: the bias of a fused norm or of a norm that subtracts its mean.

        At the start of the stream a constant may be an embedding's, where no edit says otherwise.
        """
        plain = self._graph.index.ancestors(step.change) == 0 and step.node.op_type == "Add"
        if not plain:
            return False
        if stage.place == _FINAL_NORM:
            end = self._stream.blocks[-1].output
            norm = self._graph.index.ancestors(stage.tensor) & ~self._graph.index.ancestors(end)
            nodes = self._graph.index.nodes
            return any(norm >> at & 1 and node.op_type == "Sub" for at, node in enumerate(nodes))
        return step.is_own_bias

    # ----------------------------------------------------------------------------------------------- comparing both

    def _compare(self, stage: _Stage, numbers: Sequence[int]) -> None:
        chains = self._chains(stage.tensor)
        expected = [self._expected[number] for number in numbers]
        signed = [[self._signed(step) for step in chain] for chain in chains]
        matches = [_matched(expected, signatures) for signatures in signed]
        best = max(
            range(len(chains)),
            key=lambda at: (len(matches[at]), self._feeds_stream(chains[at]), -len(chains[at])),
        )
        chain, signatures, matched = chains[best], signed[best], matches[best]
        extra = [at for at in range(len(chain)) if at not in matched.values()]
        own = [at for at in extra if at == 0 and self._is_own(chain[at], stage)]
        extra = [at for at in extra if at not in own]
        present = [number for at, number in enumerate(numbers) if at in matched]
        for at, number in enumerate(numbers):
            if at not in matched:
                self._judge(number, at, expected, signatures, extra, stage)
                if self._findings[number][0] is Finding.PRESENT:
                    present.append(number)
        odd = [chain[at] for at in extra]
        inside = {step.output for step in chain}
        odd += [step for other in chains for step in other if step.output not in inside]
        for number in present:
            self._findings.setdefault(number, (Finding.PRESENT, ""))
        if self._plan is not None:
            self._blame(odd, stage, present, numbers)
            self._check_wiring(stage, chain, present, numbers)

    def _feeds_stream(self, chain: Sequence[Step]) -> bool:
        return not chain or bool(self._graph.index.consumers[chain[-1].output])

    def _judge(
        self,
        number: int,
        at: int,
        expected: Sequence[_Signature],
        signatures: Sequence[_Signature],
        extra: list[int],
        stage: _Stage,
    ) -> None:
        """The word for an edit that no step in its place equals; takes the step that it blames out of `extra`."""
        wanted = expected[at]
        displaced = [position for position in extra if signatures[position] == wanted]
        if displaced:
            extra.remove(displaced[0])
            self._findings[number] = (Finding.ALTERED, f"acts in another order at the {stage.place}")
        elif self._on_bias(number, stage):
            self._findings[number] = (Finding.PRESENT, "in the bias of the block's last projection")
        elif extra:
            found = signatures[extra.pop(0)]
            self._findings[number] = (Finding.ALTERED, self._difference(number, wanted, found))
        else:
            self._findings[number] = (Finding.MISSING, self._whereabouts(number, wanted, stage))

    def _difference(self, number: int, wanted: _Signature, found: _Signature) -> str:
        others = [other for other, signature in enumerate(self._expected) if signature == found]
        if others:
            return f"in its place stands edit {others[0]}"
        plan = self._plan
        assert plan is not None  # noqa: S101 - only then is anything expected
        if _same_constants(wanted, found):
            text = "its constants are the plan's; where or how strongly they act is not"
            if (
                plan.edits[number].positions == Positions.LAST
                and self._inputs.last_from is not LastFrom.SEQUENCE
            ):
                column = self._lowered(plan, replace(self._inputs, last_from=LastFrom.SEQUENCE))[number]
                if column == found:
                    text = "it acts at the last column, not at the last attended position; if it was patched so, say "
                    text += "`--last-from sequence`"
            return text
        text = f"in its place stands {_words(found)}"
        pairs = list(zip(wanted.constants, found.constants, strict=False))
        if pairs and all(one.shape == other.shape for one, other in pairs):
            largest = max(
                float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max()) for one, other in pairs
            )
            text += f"; its constants differ from the plan's by up to {largest:.3g}"
        return text

    def _whereabouts(self, number: int, wanted: _Signature, stage: _Stage) -> str:
        for other in self._stages:
            steps = (step for chain in self._chains(other.tensor) for step in chain)
            if other is not stage and any(self._signed(step) == wanted for step in steps):
                return f"nothing stands at the {stage.place}; such an edit stands at the {other.place}"
        text = f"nothing stands at the {stage.place}"
        plan = self._plan
        if (
            plan is not None
            and isinstance(plan.edits[number], Add)
            and plan.edits[number].positions == Positions.ALL
        ):
            text += "; folded into a bias by an optimiser it could not be told from the model's own"
        return text

    def _on_bias(self, number: int, stage: _Stage) -> bool:
        """Whether a summand of the stream tensor adds `b + v`, constants both, with the edit's `v`."""
        plan = self._plan
        assert plan is not None  # noqa: S101
        edit = plan.edits[number]
        alone = sum(stage.tensor == self._tensor(other) for other in range(len(plan.edits))) == 1
        if not isinstance(edit, Add) or edit.positions != Positions.ALL or not alone:
            return False
        if self._inputs.strength is not None:
            return False
        vector = digest_of(scaled_vector(edit))
        index, expressions = self._graph.index, self._graph.expressions
        stack, found = [stage.tensor], 0
        while stack:
            node = index.producer_of(expressions.root(stack.pop()))
            if node is None or node.op_type != "Add":
                continue
            for name in node.input:
                if self._graph.carries(name):
                    stack += [] if expressions.root(name) in self._stream_tensors else [name]
                    continue
                bias = index.producer_of(expressions.root(name))
                if bias is not None and bias.op_type == "Add":
                    terms = [expressions.of(term, Leaves()) for term in bias.input]
                    constant = all(not index.is_computed(term) for term in bias.input)
                    found += constant and terms.count(vector) == 1
        return found == 1

    def _tensor(self, number: int) -> str | None:
        plan = self._plan
        assert plan is not None  # noqa: S101
        edit = plan.edits[number]
        try:
            return self._stream.tensor(edit.site, edit.layer)
        except SiteNotFoundError:
            return None

    def _blame(
        self, odd: Sequence[Step], stage: _Stage, present: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """Steps that no edit has: they alter the edits beside them, or are unexpected where no edit is."""
        for step in odd:
            text = f"{_words(self._signed(step))} stands at the {stage.place}, which no edit of the plan has"
            text += f" ({shown(describe(step.node))})"
            for number in present:
                self._findings[number] = (Finding.ALTERED, f"it is there, and {text}")
            if not present and stage.depth == 0 and not numbers and self._is_plain(step):
                self._notes.append(f"{text}; before block 0 it is taken for the model's own embedding")
            elif not present:
                self._unexpected.append(text)

    def _is_plain(self, step: Step) -> bool:
        return step.node.op_type == "Add" and self._graph.index.ancestors(step.change) == 0

    def _check_wiring(
        self, stage: _Stage, chain: Sequence[Step], present: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """Whatever the stream tensor feeds reads it behind its last edit."""
        if not numbers:
            return
        end = chain[-1].output if chain else stage.tensor
        reader = past(self._graph, self._stream, stage.tensor, end, stage.depth)
        if reader is None:
            return
        for number in present:
            if self._findings[number][0] is Finding.PRESENT:
                self._findings[number] = (Finding.BYPASSED, f"{shown(reader)} at the {stage.place}")

    def _check_defaults(self) -> None:
        """A strength that may be left out is 1 then; positions and lengths may not be left out."""
        if self._plan is None:
            return
        defaults = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in self._graph.model.graph.initializer
            if tensor.name in (STRENGTH_INPUT, POSITIONS_INPUT, PROMPT_LENGTHS_INPUT)
        }
        for name in (STRENGTH_INPUT, POSITIONS_INPUT, PROMPT_LENGTHS_INPUT):
            if name in self._graph.inputs:
                self._notes.append(f"told at run time, by a graph input: {name}")
        for name, values in defaults.items():
            if name == STRENGTH_INPUT and values.dtype == np.float32 and np.all(values == 1):
                continue
            expected = "1" if name == STRENGTH_INPUT else "that it must be fed"
            text = f"where {name} is not fed, it is {np.unique(values)[:3].tolist()}; expected {expected}"
            for number, (finding, _) in self._findings.items():
                if finding is Finding.PRESENT and _reads(name, self._plan.edits[number].positions):
                    self._findings[number] = (Finding.ALTERED, text)

    @property
    def _in_scope(self) -> str:
        return f" in {self._scope}" if self._scope else ""

    def _edits(self) -> tuple[AuditedEdit, ...]:
        if self._plan is None:
            return ()
        return tuple(
            AuditedEdit(
                number=number,
                layer=edit.layer,
                site=edit.site,
                op=edit.op,
                positions=edit.positions.value,
                strength=float(edit.strength),
                finding=self._findings[number][0],
                detail=self._findings[number][1],
                scope=self._scope,
            )
            for number, edit in enumerate(self._plan.edits)
        )


_FINAL_NORM = "output of the final norm"


def _stages(stream: ResidualStream) -> list[_Stage]:
    """The tensors of the stream in order; the depth of one is the number of the block that reads it."""
    stages = [_Stage(stream.blocks[0].input, "input of block 0", 0)]
    for block in stream.blocks:
        stages.append(_Stage(block.output, f"output of block {block.index}", block.index + 1))
    if stream.final_norm_output is not None:
        stages.append(_Stage(stream.final_norm_output, _FINAL_NORM, len(stream.blocks) + 1))
    return stages


def _signature(
    expressions: Expressions, op: str, hidden: str, change: str, stream: Sequence[str] | set[str]
) -> _Signature:
    leaves = Leaves({expressions.root(hidden): HIDDEN}, stream)
    constants = expressions.constants_of(change, leaves)
    return _Signature(op, expressions.of(change, leaves), tuple(constants))


def _matched(expected: Sequence[_Signature], found: Sequence[_Signature]) -> Mapping[int, int]:
    """Which expected step is which found one: the longest common subsequence."""
    lengths = [[0] * (len(found) + 1) for _ in range(len(expected) + 1)]
    for one in reversed(range(len(expected))):
        for other in reversed(range(len(found))):
            lengths[one][other] = (
                lengths[one + 1][other + 1] + 1
                if expected[one] == found[other]
                else max(lengths[one + 1][other], lengths[one][other + 1])
            )
    pairs, one, other = {}, 0, 0
    while one < len(expected) and other < len(found):
        if expected[one] == found[other]:
            pairs[one] = other
            one, other = one + 1, other + 1
        elif lengths[one + 1][other] >= lengths[one][other + 1]:
            one += 1
        else:
            other += 1
    return pairs


def _reads(name: str, positions: Positions) -> bool:
    """Whether an edit at some positions depends on a graph input of steering."""
    if name == STRENGTH_INPUT:
        return True
    return positions == Positions.LAST if name == POSITIONS_INPUT else positions.needs_prompt_length


def _same_constants(one: _Signature, other: _Signature) -> bool:
    digests = [sorted(digest_of(values) for values in each.constants) for each in (one, other)]
    return bool(one.constants) and digests[0] == digests[1]


def _words(signature: _Signature) -> str:
    """A step as a report says it."""
    norms = ", ".join(
        f"{list(values.shape)} of norm {np.linalg.norm(values.astype(np.float64)):.4g}"
        for values in signature.constants
    )
    kind = "an addition" if signature.op.startswith("Add") else "a subtraction"
    return f"{kind} of constants {norms}" if norms else f"{kind} without constants"
