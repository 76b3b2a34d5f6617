"""Who produces and who depends on what in a graph: the facts that structure is read from.

Ancestor sets are bit sets held in Python integers: one bit per node and one per graph input. For a
32-block decoder of 6000 nodes they take a few megabytes and a few milliseconds.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from calibration.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable

MATMUL_OPS = frozenset(
    {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "Einsum", "Conv"}
)
CONSTANT_OPS = frozenset({"Constant"})


class GraphIndex:
    """Producers, consumers and ancestors of the tensors of a graph whose nodes are in topological order.

    `outer_inputs`, `outer_constants`: for a body, what it may read from outside. Raises `InputError` when a node
    reads a tensor that nothing before it produces.
    """

    def __init__(
        self, graph: GraphProto, outer_inputs: Iterable[str] = (), outer_constants: Iterable[TensorProto] = ()
    ) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in (*outer_constants, *graph.initializer)}
        self.constants = set(self.initializers)
        self.constants |= {str(tensor.values.name) for tensor in graph.sparse_initializer}
        named = [*(value.name for value in graph.input), *outer_inputs]
        self.inputs = [name for name in named if name not in self.constants]
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        known = self.constants | set(self.inputs)
        for position, node in enumerate(self.nodes):
            for name in reads(node):
                if name not in known:
                    raise InputError(
                        f"node {describe(node)} reads {name!r}, which no input, initializer or earlier node "
                        "defines; the graph is damaged or not in topological order"
                    )
                self.consumers[name].append(position)
            for name in filter(None, node.output):
                if name in known:
                    raise InputError(f"tensor {name!r} is defined twice, the second time by {describe(node)}")
                self.producer[name] = position
                known.add(name)
                if node.op_type in CONSTANT_OPS:
                    self.constants.add(name)

    def producer_of(self, tensor: str) -> NodeProto | None:
        """The node that computes `tensor`; None for graph inputs and initializers."""
        position = self.producer.get(tensor)
        return None if position is None else self.nodes[position]

    def bit(self, tensor: str) -> int:
        """The bit that stands for `tensor` in ancestor sets; 0 for constants, and for an input that is left out."""
        if not tensor or tensor in self.constants:
            return 0
        if tensor in self.producer:
            return 1 << self.producer[tensor]
        if tensor not in self._input_number:
            raise InputError(
                f"no input, initializer or node of the graph defines {tensor!r}; the graph is damaged"
            )
        return 1 << (len(self.nodes) + self._input_number[tensor])

    def ancestors(self, tensor: str) -> int:
        """Everything `tensor` depends on, itself included."""
        position = self.producer.get(tensor)
        return self.bit(tensor) if position is None else self._closures[0][position]

    def is_computed(self, tensor: str) -> bool:
        """Whether `tensor` depends on a graph input; what does not is a weight, however it is stored."""
        return bool(self.ancestors(tensor) >> len(self.nodes))

    def ancestors_through_matmul(self, tensor: str) -> int:
        """Everything `tensor` depends on by way of at least one matrix product."""
        position = self.producer.get(tensor)
        return 0 if position is None else self._closures[1][position]

    @cached_property
    def input_ranks(self) -> dict[str, int]:
        """How many dimensions the file records for each graph input; 0 where it records no shape."""
        given = set(self.inputs)
        return {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in self.graph.input
            if value.name in given
        }

    @cached_property
    def _input_number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.inputs)}

    @cached_property
    def _closures(self) -> tuple[list[int], list[int]]:
        plain: list[int] = []
        through: list[int] = []
        for position, node in enumerate(self.nodes):
            before, via = 0, 0
            for name in reads(node):
                source = self.producer.get(name)
                if name in self.constants:
                    continue
                before |= self.bit(name) if source is None else plain[source]
                via |= 0 if source is None else through[source]
            through.append(via | before if node.op_type in MATMUL_OPS else via)
            plain.append(before if node.op_type in CONSTANT_OPS else before | 1 << position)
        return plain, through


def reads(node: NodeProto) -> list[str]:
    """The outer tensors a node reads: its inputs, and what its subgraphs capture."""
    names = [name for name in node.input if name]
    for body in subgraphs(node):
        inner = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        for child in body.node:
            names += [name for name in reads(child) if name not in inner]
            inner.update(child.output)
        names += [value.name for value in body.output if value.name not in inner]
    return names


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The bodies of an `If`, `Loop` or `Scan`."""
    single: list[GraphProto] = []
    several: list[GraphProto] = []
    for attribute in node.attribute:  # once through: this is asked of every node, and few have a body
        if attribute.type == AttributeProto.GRAPH:
            single.append(attribute.g)
        several.extend(attribute.graphs)
    return single + several


def rename_reads(node: NodeProto, old: str, new: str) -> None:
    """Make a node read `new` where it read `old`."""
    for position, name in enumerate(node.input):
        if name == old:
            node.input[position] = new
    if any(old in reads(child) for body in subgraphs(node) for child in body.node):
        raise UnsupportedError(f"node {describe(node)}: its body captures {old!r}, which cannot be re-wired")


def describe(node: NodeProto) -> str:
    """A node as an error message names it."""
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} -> {', '.join(node.output)}"
