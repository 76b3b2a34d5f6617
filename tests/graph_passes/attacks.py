"""What somebody, or some tool, may do to a steered graph: each takes a graph and gives an altered copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from graph_passes.graph_index import reads, subgraphs


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def renamed(model: onnx.ModelProto, *, seed: int = 0) -> onnx.ModelProto:
    """Every node and tensor under a random name, but for the graph's inputs and outputs; no metadata, no types."""
    model = copied(model)
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    generator, names = np.random.default_rng(seed), dict[str, str]()

    def new(name: str) -> str:
        if not name or name in kept:
            return name
        return names.setdefault(name, f"t{generator.integers(2**63):x}")

    def rename(graph: onnx.GraphProto, *, inner: bool) -> None:
        for tensor in graph.initializer:
            tensor.name = new(tensor.name)
        for value in graph.value_info:
            value.name = new(value.name)
        for value in graph.output if inner else ():
            value.name = new(value.name)
        for node in graph.node:
            node.name = f"n{generator.integers(2**63):x}"
            del node.metadata_props[:]
            for fields in (node.input, node.output):
                for position, name in enumerate(fields):
                    fields[position] = new(name)
            for body in subgraphs(node):
                rename(body, inner=True)

    rename(model.graph, inner=False)
    del model.metadata_props[:]
    return model


def optimised(model: onnx.ModelProto, folder: Path, level: str) -> onnx.ModelProto:
    """The graph as ONNX Runtime's optimiser writes it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def with_values(model: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    """Other values in a constant of the same name."""
    model = copied(model)
    initializer(model, name).CopyFrom(numpy_helper.from_array(values, name))
    return model


def one_ulp(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    values = numpy_helper.to_array(initializer(model, name)).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(np.inf))
    return with_values(model, name, values)


def one_bit(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The lowest bit of the first value flipped, in any type."""
    values = numpy_helper.to_array(initializer(model, name)).copy()
    values.reshape(-1).view(np.uint8)[0] ^= 1
    return with_values(model, name, values)


def negated(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    return with_values(model, name, -numpy_helper.to_array(initializer(model, name)))


def swapped(model: onnx.ModelProto, one: str, other: str) -> onnx.ModelProto:
    """Two constants with each other's values."""
    first, second = (numpy_helper.to_array(initializer(model, name)).copy() for name in (one, other))
    return with_values(with_values(model, one, second), other, first)


def readers(model: onnx.ModelProto, tensor: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if tensor in reads(node)]


def rewired(model: onnx.ModelProto, old: str, new: str, *, only: str | None = None) -> onnx.ModelProto:
    """Nodes that read `old`, or only those of an operator, read `new` instead; `new` must stand before them."""
    model = copied(model)
    changed = 0
    for node in model.graph.node:
        if new in node.output or (only is not None and node.op_type != only):
            continue
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
                changed += 1
    assert changed
    return model


def without_edit(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The steering of a tensor taken out, its readers rewired, its nodes deleted."""
    unsteered = f"sarsteer.unsteered.{tensor}"
    model = rewired(model, tensor, unsteered)
    kept = [node for node in model.graph.node if tensor not in node.output]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def with_constant(model: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    model = copied(model)
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def with_node(model: onnx.ModelProto, before: str, node: onnx.NodeProto) -> onnx.ModelProto:
    """One more node, before the first that reads the tensor `before`."""
    model = copied(model)
    position = next(at for at, each in enumerate(model.graph.node) if before in each.input)
    model.graph.node.insert(position, node)
    return model


def inserted(
    model: onnx.ModelProto, tensor: str, nodes: list[onnx.NodeProto], *, only: str | None = None
) -> onnx.ModelProto:
    """Nodes behind what computes `tensor`; whoever read that, or those of an operator, reads what the last computes."""
    model = rewired(model, tensor, nodes[-1].output[0], only=only)
    position = next(at for at, node in enumerate(model.graph.node) if tensor in node.output)
    for node in reversed(nodes):
        model.graph.node.insert(position + 1, node)
    return model
