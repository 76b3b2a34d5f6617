"""What is done to the residual stream besides its residual adds, told by structure alone.

A *step* takes the stream and gives the stream: `h ± t`, where `t` knows nothing of the tokens (constants, masks, graph
inputs that steer), or `h − d(h)`, where `d` is computed from `h` alone by way of a matrix product. Steering consists of
such steps; so do biases of projections and of norms, which stand elsewhere. Without its steps a graph has the stream
of the unsteered decoder, however its nodes and tensors are called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from onnx import GraphProto, ModelProto, NodeProto

from graph_passes.attention import PER_LAYER_INPUTS, cache_inputs
from graph_passes.expressions import (
    DEFAULT_DOMAINS,
    Constants,
    Expressions,
    reads_shape_only,
)
from graph_passes.fused_norms import ADDED_KEY
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, reads
from graph_passes.nameless import nameless
from graph_passes.transparent import QDQ_OPS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT_INPUTS = ("inputs_embeds", "input_ids", PER_LAYER_INPUTS)
"""Graph inputs that hold the tokens."""
OTHER_INPUTS = frozenset({"attention_mask", "position_ids"})
VIEWS = QDQ_OPS | frozenset(
    {
        "Cast",
        "Div",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherND",
        "Mul",
        "Neg",
        "Reshape",
        "Slice",
        "Squeeze",
    }
    | {"Tile", "Transpose", "Unsqueeze"}
)
"""What keeps a stream a stream where its other operands do not depend on the tokens; a step may hide behind it."""
DEFAULTS_IR_VERSION = 4
"""From this IR version on, an initializer that is also an input is a default; before, every initializer is."""


@dataclass(frozen=True)
class Step:
    """`output` = `hidden` + `change`, or `hidden` − `change` where the node subtracts.

    `is_straight`: `hidden` is the stream tensor it is filed under, not something rescaled, cast or selected of that.
    """

    node: NodeProto
    hidden: str
    change: str
    output: str
    is_straight: bool = True

    @property
    def is_own_bias(self) -> bool:
        """Whether it is the bias input of a fused norm, which `split_fused_norms` has taken out of it."""
        return any(entry.key == ADDED_KEY for entry in self.node.metadata_props)


class SteppedGraph:
    """A flat decoder graph and the steps in it. `sources`: for every node, the tensors whose values it reads.

    `model` is left as it is: read is a copy without metadata, in which names say nothing and fused norms are split.
    """

    def __init__(self, model: ModelProto, opset: int, folder: Path | None) -> None:
        self.model = nameless(model)
        graph = self.model.graph
        self.index = GraphIndex(graph)
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        defaults = self.model.ir_version >= DEFAULTS_IR_VERSION
        self.inputs = {
            value.name: value.type.tensor_type.elem_type
            for value in graph.input
            if defaults or value.name not in tensors
        }
        constants = Constants(tensors, folder)
        self.expressions = Expressions(self.index.nodes, constants, self.inputs, opset)
        self.sources = [[] if reads_shape_only(node) else reads(node) for node in self.index.nodes]
        self.content = self._content_inputs()
        self.values = self._values()
        self.by_output: dict[str, Step] = {}
        self._inside: set[str] = set()
        for node in self.index.nodes:
            if (step := self._step(node)) is not None:
                self.by_output[step.output] = step
        for output in self._inside & self.by_output.keys():
            if self._only_read_inside(output):
                del self.by_output[output]
        self.after: dict[str, list[Step]] = {}
        for step in self.by_output.values():
            for number, base in enumerate(self._bases(step.hidden)):
                filed = step if number == 0 else replace(step, is_straight=False)
                self.after.setdefault(base, []).append(filed)

    def carries(self, tensor: str) -> bool:
        """Whether the values of a tensor depend on the tokens."""
        return bool(self.values.get(tensor, 0) & self._content_bits)

    @cached_property
    def names(self) -> dict[str, set[str]]:
        """Every name that a tensor has, itself included, by what `Expressions.root` gives for each of them."""
        names: dict[str, set[str]] = {}
        for tensor in self.index.producer:
            root = self.expressions.root(tensor)
            names.setdefault(root, {root}).add(tensor)
        return names

    def without_steps(self) -> ModelProto:
        """A copy of the graph in which whoever reads a step's output reads what the step was given.

        An output of the graph that a step computes is that tensor itself, under its name.
        """
        bare = ModelProto()
        bare.CopyFrom(self.model)
        for node in bare.graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = self.before_steps(name)
        given_out = {value.name for value in bare.graph.output}
        for node in bare.graph.node:
            if node.output and node.output[0] in given_out & self.by_output.keys():
                before = self.before_steps(node.output[0])
                node.CopyFrom(NodeProto(op_type="Identity", input=[before], output=node.output[:1]))
        _drop_unread(bare.graph)
        return bare

    def before_steps(self, tensor: str) -> str:
        """The tensor that steps, and what changes nothing, made `tensor` of."""
        while (step := self.by_output.get(root := self.expressions.root(tensor))) is not None:
            tensor = step.hidden
        return root

    def _content_inputs(self) -> list[str]:
        named = [name for name in self.index.inputs if name in CONTENT_INPUTS]
        others = OTHER_INPUTS.union(cache_inputs(self.index))
        return named or [name for name in self.index.inputs if name not in others]

    def _values(self) -> dict[str, int]:
        """For every tensor, the graph inputs that its values depend on: one bit each, and one for a looked-up table."""
        self.bits = {name: 1 << number for number, name in enumerate(self.index.inputs)}
        lookup = 1 << len(self.bits)
        self._content_bits = lookup
        for name in self.content:
            self._content_bits |= self.bits[name]
        values = dict(self.bits)
        ranks = {
            tensor.name: len(tensor.dims)
            for tensor in self.model.graph.initializer
            if tensor.name not in self.inputs
        }
        for node in self.index.nodes:
            found = 0
            if not reads_shape_only(node):
                for name in reads(node):
                    found |= values.get(name, 0)
            if node.op_type.startswith("Gather") and any(ranks.get(name, 0) > 1 for name in node.input[:1]):
                found |= lookup  # an embedding of positions or token types is the stream's own
            values |= {name: found for name in node.output if name}
        return values

    def _step(self, node: NodeProto) -> Step | None:
        if node.op_type not in ("Add", "Sub") or node.domain not in DEFAULT_DOMAINS or len(node.input) != 2:
            return None
        if self.expressions.root(node.output[0]) != node.output[0]:
            return None  # it adds nothing at all
        first, second = node.input
        if node.op_type == "Sub":
            local = self.carries(first) and (not self.carries(second) or self._is_projection(second, first))
            return Step(node, first, second, node.output[0]) if local else None
        if self.carries(first) is self.carries(second):
            return None
        hidden, change = (first, second) if self.carries(first) else (second, first)
        return Step(node, hidden, change, node.output[0])

    def _bases(self, hidden: str) -> Iterator[str]:
        """`hidden`, and what it was made of by casts, scales, selections and other views alone."""
        tensor = self.expressions.root(hidden)
        yield tensor
        while (node := self.index.producer_of(tensor)) is not None and node.op_type in VIEWS:
            carrying = [name for name in node.input if name and self.carries(name)]
            if len(carrying) != 1:
                return
            tensor = self.expressions.root(carrying[0])
            yield tensor

    def _only_read_inside(self, tensor: str) -> bool:
        """Whether all readers of a tensor compute the change of a projection."""
        readers = [self.index.nodes[position] for position in self.index.consumers[tensor]]
        return all(set(filter(None, reader.output)) <= self._inside for reader in readers)

    def _is_projection(self, change: str, hidden: str) -> bool:
        """Whether `change` is computed from `hidden` and from what knows nothing of the tokens, by a matrix product."""
        start = self.expressions.root(hidden)
        floor = self.index.producer.get(start, -1)
        found, seen, stack = False, set[str](), [change]
        while stack:
            tensor = self.expressions.root(stack.pop())
            if tensor == start or tensor in seen or not self.carries(tensor):
                continue
            seen.add(tensor)
            position = self.index.producer.get(tensor, -1)
            if position <= floor:
                return False
            node = self.index.nodes[position]
            found |= node.op_type in MATMUL_OPS
            stack += [] if reads_shape_only(node) else reads(node)
        if found:
            self._inside |= seen
        return found


def _drop_unread(graph: GraphProto) -> None:
    """Delete nodes that no output depends on."""
    needed = {value.name for value in graph.output}
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        if needed.isdisjoint(node.output):
            del graph.node[position]
        else:
            needed.update(reads(node))
