"""What an audit finds in one graph: the tensors of the residual stream, and the steps that stand on each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from graph_passes.audit_report import FoundStep
from graph_passes.audit_signature import Signature, signature_of
from graph_passes.graph_index import describe
from graph_passes.nameless import shown
from graph_passes.residual_stream import find_residual_stream
from graph_passes.steps import Step, SteppedGraph
from graph_passes.wiring import odd_sums, sums_between

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnx import ModelProto

    from graph_passes.residual_stream import ResidualStream

MAX_PATHS = 16
"""More chains of steps than this behind one tensor of the stream are not told apart."""
FINAL_NORM = "output of the final norm"


@dataclass(frozen=True)
class Stage:
    """A tensor of the stream: what the model computes there, in words, and which blocks it comes before."""

    tensor: str
    place: str
    depth: int


class FoundStream:
    """The residual stream of a flat decoder graph, and what stands on it.

    `folder`: where the graph's external data lies. `scope`: the body it is, for reports.
    """

    def __init__(self, view: ModelProto, opset: int, folder: Path | None, scope: str) -> None:
        self.opset, self._scope = opset, scope
        self.graph = SteppedGraph(view, opset, folder)
        self.stream = self._before_steps(find_residual_stream(self.graph.without_steps()))
        self.stages = _stages(self.stream)
        self.tensors = self._of_stream_shape()

    def chains(self, tensor: str) -> list[list[Step]]:
        """Every chain of steps behind a tensor of the stream, to its end; one empty chain where there is none."""
        chains: list[list[Step]] = []
        stack: list[list[Step]] = [[]]
        while stack and len(chains) < MAX_PATHS:
            chain = stack.pop()
            behind = self.graph.expressions.root(chain[-1].output if chain else tensor)
            steps = self.graph.after.get(behind, [])
            stack += [[*chain, step] for step in steps]
            if not steps:
                chains.append(chain)
        return chains or [[]]

    def signed(self, step: Step) -> Signature:
        """What a step does."""
        op = step.node.op_type if step.is_straight else f"{step.node.op_type} to a view"
        return signature_of(self.graph.expressions, op, step.hidden, step.change, self.tensors)

    def feeds_stream(self, chain: Sequence[Step]) -> bool:
        """Whether anything reads what a chain ends with."""
        return not chain or bool(self.graph.index.consumers[chain[-1].output])

    def is_plain(self, step: Step) -> bool:
        """Whether a step adds what no input of the graph tells."""
        return step.node.op_type == "Add" and self.graph.index.ancestors(step.change) == 0

    def is_own(self, step: Step, stage: Stage) -> bool:
        """Whether a step may be the model's: the bias of a fused norm or of a norm that subtracts its mean.

        At the start of the stream a constant may be an embedding's, where no edit says otherwise.
        """
        if not self.is_plain(step):
            return False
        if stage.place == FINAL_NORM:
            end = self.stream.blocks[-1].output
            norm = self.graph.index.ancestors(stage.tensor) & ~self.graph.index.ancestors(end)
            nodes = self.graph.index.nodes
            return any(norm >> at & 1 and node.op_type == "Sub" for at, node in enumerate(nodes))
        return step.is_own_bias

    def steps(self) -> list[FoundStep]:
        """All that stands on the stream, the model's own left out."""
        found = []
        for stage in self.stages:
            seen: set[str] = set()
            for step in (step for chain in self.chains(stage.tensor) for step in chain):
                if step.output not in seen and not self.is_own(step, stage):
                    seen.add(step.output)
                    what, node = str(self.signed(step)), shown(describe(step.node))
                    found.append(FoundStep(stage.place, what, node, self._scope))
        return [*found, *self.inside_steps()]

    def inside_steps(self) -> list[FoundStep]:
        """What is done to the stream between its blocks' ends, besides the blocks' own residual adds."""
        found = []
        for before, after in pairwise(self.stages):
            if after.place == FINAL_NORM:
                continue
            place = f"inside block {before.depth}"
            starts = {before.tensor} | self._outputs_behind(before)
            sums = sums_between(self.graph, starts, after.tensor)
            behind = self._outputs_behind(
                after
            )  # these see the sums through pairs of Q/DQ, and stand on no sum
            for tensor in sorted(sums - starts - {after.tensor}):
                for step in self.graph.after.get(self.graph.expressions.root(tensor), []):
                    if not step.is_own_bias and step.output not in behind:
                        what = str(self.signed(step))
                        found.append(FoundStep(place, what, shown(describe(step.node)), self._scope))
            found += [
                FoundStep(place, "an addition that is no residual add", shown(describe(node)), self._scope)
                for node in odd_sums(self.graph, starts | sums - {after.tensor}, sums)
            ]
        return list(dict.fromkeys(found))

    def _before_steps(self, stream: ResidualStream) -> ResidualStream:
        """A stream whose final norm, where the graph gives it out, is the tensor that steps made the output of."""
        given_out = stream.final_norm_output
        if given_out is None:
            return stream
        norm = self.graph.before_steps(given_out)
        types = ((norm if name == given_out else name, elem_type) for name, elem_type in stream.other_types)
        return replace(stream, final_norm_output=norm, other_types=tuple(types))

    def _outputs_behind(self, stage: Stage) -> set[str]:
        return {step.output for chain in self.chains(stage.tensor) for step in chain}

    def _of_stream_shape(self) -> set[str]:
        """The tensors that have the shape of the stream: those before blocks, what they are cast from, steps."""
        tensors: set[str] = set()
        for stage in self.stages:
            tensors |= {stage.tensor} | self._outputs_behind(stage)
        start, index = self.stages[0].tensor, self.graph.index
        while (node := index.producer_of(start)) is not None and node.op_type in ("Cast", "Identity"):
            start = node.input[0]
            tensors.add(start)
        return tensors | {self.graph.expressions.root(tensor) for tensor in tensors}


def _stages(stream: ResidualStream) -> list[Stage]:
    """The tensors of the stream in order; the depth of one is the number of the block that reads it."""
    stages = [Stage(stream.blocks[0].input, "input of block 0", 0)]
    for block in stream.blocks:
        stages.append(Stage(block.output, f"output of block {block.index}", block.index + 1))
    if stream.final_norm_output is not None:
        stages.append(Stage(stream.final_norm_output, FINAL_NORM, len(stream.blocks) + 1))
    return stages
