"""The judgement of an audit: what was found on one residual stream against what a plan expects there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from onnx import numpy_helper

from calibration.plan import Add, Positions
from graph_passes.audit_report import Finding
from graph_passes.audit_signature import Signature, matched
from graph_passes.expressions import Leaves, digest_of
from graph_passes.graph_index import describe
from graph_passes.lowering import scaled_vector
from graph_passes.nameless import shown
from graph_passes.selection import POSITIONS_INPUT, PROMPT_LENGTHS_INPUT, STRENGTH_INPUT, LastFrom
from graph_passes.wiring import past

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graph_passes.audit_expected import ExpectedEdits
    from graph_passes.audit_found import FoundStream, Stage
    from graph_passes.steps import Step


class Judgement:
    """A word per edit, `findings` with their details, and whatever else makes an audit fail, `unexpected`."""

    def __init__(self, found: FoundStream, expected: ExpectedEdits) -> None:
        self._found, self._expected, self._plan = found, expected, expected.plan
        self.unexpected: list[str] = []
        self.notes: list[str] = []
        self.findings: dict[int, tuple[Finding, str]] = {}
        for number in expected.lost:
            self.findings[number] = (Finding.MISSING, "the graph has no final norm over every position")
        for stage in found.stages:
            self._compare(stage, expected.numbers.get(stage.tensor, []))
        self._check_defaults()

    def _compare(self, stage: Stage, numbers: Sequence[int]) -> None:
        """Compare what stands on one tensor of the stream; of several chains, with the one that matches best."""
        chains = self._found.chains(stage.tensor)
        expected = [self._expected.signatures[number] for number in numbers]
        signed = [[self._found.signed(step) for step in chain] for chain in chains]
        matches = [matched(expected, signatures) for signatures in signed]
        best = max(
            range(len(chains)),
            key=lambda at: (len(matches[at]), self._found.feeds_stream(chains[at]), -len(chains[at])),
        )
        chain, signatures, pairs = chains[best], signed[best], matches[best]
        extra = [at for at in range(len(chain)) if at not in pairs.values()]
        own = [at for at in extra if at == 0 and self._found.is_own(chain[at], stage)]
        extra = [at for at in extra if at not in own]
        present = [number for at, number in enumerate(numbers) if at in pairs]
        for at, number in enumerate(numbers):
            if at not in pairs:
                self._judge(number, expected[at], signatures, extra, stage)
                if self.findings[number][0] is Finding.PRESENT:
                    present.append(number)
        odd = [chain[at] for at in extra]
        inside = {step.output for step in chain}
        odd += [step for other in chains for step in other if step.output not in inside]
        for number in present:
            self.findings.setdefault(number, (Finding.PRESENT, ""))
        self._blame(odd, stage, present, numbers)
        self._check_wiring(stage, chain, present, numbers)

    def _judge(
        self,
        number: int,
        wanted: Signature,
        signatures: Sequence[Signature],
        extra: list[int],
        stage: Stage,
    ) -> None:
        """The word for an edit that no step in its place equals; takes the step that it blames out of `extra`."""
        displaced = [position for position in extra if signatures[position] == wanted]
        if displaced:
            extra.remove(displaced[0])
            self.findings[number] = (Finding.ALTERED, f"acts in another order at the {stage.place}")
        elif self._on_bias(number, stage):
            self.findings[number] = (Finding.PRESENT, "in the bias of the block's last projection")
        elif extra:
            found = signatures[extra.pop(0)]
            self.findings[number] = (Finding.ALTERED, self._difference(number, wanted, found))
        else:
            self.findings[number] = (Finding.MISSING, self._whereabouts(number, wanted, stage))

    def _difference(self, number: int, wanted: Signature, found: Signature) -> str:
        others = [other for other, signature in enumerate(self._expected.signatures) if signature == found]
        if others:
            return f"in its place stands edit {others[0]}"
        if wanted.has_constants_of(found):
            text = "its constants are the plan's; where or how strongly they act is not"
            inputs = self._expected.inputs
            if (
                self._plan.edits[number].positions == Positions.LAST
                and inputs.last_from is not LastFrom.SEQUENCE
            ):
                column = self._expected.lowered(replace(inputs, last_from=LastFrom.SEQUENCE))[number]
                if column == found:
                    text = "it acts at the last column, not at the last attended position; if it was patched so, say "
                    text += "`--last-from sequence`"
            return text
        text = f"in its place stands {found}"
        if (distance := wanted.distance(found)) is not None:
            text += f"; its constants differ from the plan's by up to {distance:.3g}"
        return text

    def _whereabouts(self, number: int, wanted: Signature, stage: Stage) -> str:
        for other in self._found.stages:
            steps = (step for chain in self._found.chains(other.tensor) for step in chain)
            if other is not stage and any(self._found.signed(step) == wanted for step in steps):
                return f"nothing stands at the {stage.place}; such an edit stands at the {other.place}"
        text, edit = f"nothing stands at the {stage.place}", self._plan.edits[number]
        if isinstance(edit, Add) and edit.positions == Positions.ALL:
            text += "; folded into a bias by an optimiser it could not be told from the model's own"
        return text

    def _on_bias(self, number: int, stage: Stage) -> bool:
        """Whether a summand of the stream tensor adds `b + v`, constants both, with the edit's `v`."""
        edit = self._plan.edits[number]
        tensors = [self._expected.tensor(other) for other in range(len(self._plan.edits))]
        if not isinstance(edit, Add) or edit.positions != Positions.ALL or tensors.count(stage.tensor) != 1:
            return False
        if self._expected.inputs.strength is not None:
            return False
        vector = digest_of(scaled_vector(edit))
        graph = self._found.graph
        index, expressions = graph.index, graph.expressions
        stack, found = [stage.tensor], 0
        while stack:
            node = index.producer_of(expressions.root(stack.pop()))
            if node is None or node.op_type != "Add":
                continue
            for name in node.input:
                if graph.carries(name):
                    stack += [] if expressions.root(name) in self._found.tensors else [name]
                    continue
                bias = index.producer_of(expressions.root(name))
                if bias is not None and bias.op_type == "Add":
                    terms = [expressions.of(term, Leaves()) for term in bias.input]
                    constant = all(not index.is_computed(term) for term in bias.input)
                    found += constant and terms.count(vector) == 1
        return found == 1

    def _blame(
        self, odd: Sequence[Step], stage: Stage, present: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """Steps that no edit has: they alter the edits beside them, or are unexpected where no edit is."""
        for step in odd:
            text = f"{self._found.signed(step)} stands at the {stage.place}, which no edit of the plan has"
            text += f" ({shown(describe(step.node))})"
            for number in present:
                self.findings[number] = (Finding.ALTERED, f"it is there, and {text}")
            if not present and stage.depth == 0 and not numbers and self._found.is_plain(step):
                self.notes.append(f"{text}; before block 0 it is taken for the model's own embedding")
            elif not present:
                self.unexpected.append(text)

    def _check_wiring(
        self, stage: Stage, chain: Sequence[Step], present: Sequence[int], numbers: Sequence[int]
    ) -> None:
        """Whatever the stream tensor feeds reads it behind its last edit."""
        if not numbers:
            return
        end = chain[-1].output if chain else stage.tensor
        reader = past(self._found.graph, self._found.stream, stage.tensor, end, stage.depth)
        if reader is None:
            return
        for number in present:
            if self.findings[number][0] is Finding.PRESENT:
                self.findings[number] = (Finding.BYPASSED, f"{shown(reader)} at the {stage.place}")

    def _check_defaults(self) -> None:
        """A strength that may be left out is 1 then; positions and lengths may not be left out."""
        graph = self._found.graph
        names = (STRENGTH_INPUT, POSITIONS_INPUT, PROMPT_LENGTHS_INPUT)
        told = [name for name in names if name in graph.inputs]
        self.notes += [f"told at run time, by a graph input: {name}" for name in told]
        for tensor in graph.model.graph.initializer:
            name = tensor.name
            if name not in names:
                continue
            values = numpy_helper.to_array(tensor)
            if name == STRENGTH_INPUT and values.dtype == np.float32 and np.all(values == 1):
                continue
            expected = "1" if name == STRENGTH_INPUT else "that it must be fed"
            text = f"where {name} is not fed, it is {np.unique(values)[:3].tolist()}; expected {expected}"
            for number, (finding, _) in self.findings.items():
                if finding is Finding.PRESENT and _reads(name, self._plan.edits[number].positions):
                    self.findings[number] = (Finding.ALTERED, text)


def _reads(name: str, positions: Positions) -> bool:
    """Whether an edit at some positions depends on a graph input of steering."""
    if name == STRENGTH_INPUT:
        return True
    return positions == Positions.LAST if name == POSITIONS_INPUT else positions.needs_prompt_length
