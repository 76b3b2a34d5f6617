"""Where in a file the decoder is computed: in the graph itself, or in each body of an `If`.

Optimum's merged decoders hold two bodies, one for passes with a past and one for passes without; both must be
steered. Structure is read from a *view*: a flat graph in which the `If` is replaced by the body, and calls of
the file's own functions by what those compute. Edits are made in the file's graphs, found by the same tensor names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx.inliner
from onnx import AttributeProto, ModelProto, NodeProto

from calibration.errors import InputError
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, describe, subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnx import GraphProto


MOST_NODES = 100_000
"""No decoder has more nodes with its functions written out (one of 80 blocks has 15 thousand); a file that claims to is
made to exhaust memory."""
DEEPEST_CALLS = 100
"""Functions that call functions further than this are nobody's decoder."""


@dataclass(frozen=True)
class Scope:
    """A graph of a file that computes the decoder from its inputs to its logits.

    `node`, `attribute`: the position of the `If` in the file's graph and the name of the body; both None for
    the graph itself.
    """

    node: int | None = None
    attribute: str | None = None

    def __str__(self) -> str:
        """How reports name it: nothing for the graph itself."""
        return "" if self.attribute is None else self.attribute

    def graph(self, model: ModelProto) -> GraphProto:
        """The graph in `model` itself, to be read or changed."""
        if self.node is None:
            return model.graph
        attributes = model.graph.node[self.node].attribute
        return next(attribute.g for attribute in attributes if attribute.name == self.attribute)

    def index(self, model: ModelProto) -> GraphIndex:
        """Who produces and reads what in this graph; a body also reads what stands before its `If`."""
        if self.node is None:
            return GraphIndex(model.graph)
        outer = model.graph
        computed = [name for node in outer.node[: self.node] for name in node.output if name]
        return GraphIndex(
            self.graph(model),
            [*(value.name for value in outer.input), *computed],
            outer.initializer,
        )

    def view(self, model: ModelProto) -> ModelProto:
        """A flat graph to read the decoder's structure from; `model` itself where it is flat already."""
        flat = self.flat(model)
        return flat if not flat.functions else inlined(flat)

    def flat(self, model: ModelProto) -> ModelProto:
        """The view before functions are seen through."""
        return model if self.node is None else _with_body(model, self)


def decoder_scopes(model: ModelProto) -> tuple[Scope, ...]:
    """Every graph of a file that computes the decoder: the graph itself, or the bodies of its `If`."""
    merged = [position for position, node in enumerate(model.graph.node) if _computes(node)]
    if not merged:
        return (Scope(),)
    return tuple(Scope(merged[-1], name) for name in _bodies(model.graph.node[merged[-1]]))


def inlined(model: ModelProto) -> ModelProto:
    """A copy of `model` whose calls of its own functions are replaced by what they compute; outer names stay.

    A function written for another opset is read as if for the graph's, which the inliner asks for: this is a view.
    """
    _check_expansion(model)
    try:
        return onnx.inliner.inline_local_functions(_of_one_opset(model))
    except Exception as error:  # whatever is thrown in C++, as for functions that call themselves
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"the graph's functions cannot be read: {reason}") from error


def _check_expansion(model: ModelProto) -> None:
    """Raise `InputError` for functions that call themselves, or that a few kilobytes make millions of nodes."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Sequence[NodeProto], callers: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            called = (node.domain, node.op_type)
            if len(callers) > DEEPEST_CALLS:
                raise InputError(f"the file's functions call each other more than {DEEPEST_CALLS} deep")
            if called in callers:
                raise InputError(f"the function {node.op_type!r} of the file calls itself; expected an end")
            if called in functions and called not in sizes:
                sizes[called] = size(functions[called].node, (*callers, called))
            total += sizes.get(called, 1) + sum(size(body.node, callers) for body in subgraphs(node))
        return total

    found = size(model.graph.node, ())
    if found > MOST_NODES:
        raise InputError(
            f"the file's functions stand for more than {MOST_NODES:,} nodes; no decoder has as many"
        )


def _of_one_opset(model: ModelProto) -> ModelProto:
    """`model`, or a copy whose functions name the graph's opsets as theirs."""
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    view = model
    for number, function in enumerate(model.functions):
        for at, entry in enumerate(function.opset_import):
            version = versions.get(entry.domain or "ai.onnx", entry.version)
            if version != entry.version:
                if view is model:
                    view = ModelProto()
                    view.CopyFrom(model)
                view.functions[number].opset_import[at].version = version
    return view


def _computes(node: NodeProto) -> bool:
    """Whether a node has several bodies with matrix products: a merged decoder."""
    return len(list(_bodies(node))) > 1 and any(
        child.op_type in MATMUL_OPS for body in subgraphs(node) for child in body.node
    )


def _bodies(node: NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name


def _with_body(model: ModelProto, scope: Scope) -> ModelProto:
    """The file's graph with the `If` replaced by one of its bodies."""
    assert scope.node is not None  # noqa: S101 - only called for bodies
    branch = model.graph.node[scope.node]
    body = scope.graph(model)
    if len(body.output) != len(branch.output):
        raise InputError(
            f"{describe(branch)}: its {scope.attribute} has {len(body.output)} outputs; expected {len(branch.output)}"
        )
    view = ModelProto()
    view.CopyFrom(model)
    view.graph.initializer.extend(body.initializer)
    view.graph.value_info.extend([*body.value_info, *body.output])
    nodes = list(model.graph.node)
    handed_on = [
        NodeProto(op_type="Identity", input=[inner.name], output=[outer])
        for inner, outer in zip(body.output, branch.output, strict=True)
        if outer and inner.name != outer
    ]
    del view.graph.node[:]
    view.graph.node.extend([*nodes[: scope.node], *body.node, *handed_on, *nodes[scope.node + 1 :]])
    return view
