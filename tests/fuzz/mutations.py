"""Structure-aware damage to a graph. A mutation takes two numbers that pick what it does, so that a case can be kept.

A mutation changes the graph it is given, and does nothing where it finds nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

Mutate: TypeAlias = Callable[[ModelProto, int, int], None]
T = TypeVar("T")

NAMES = (
    "",
    "sarsteer.",
    "sarsteer.zeros",
    "sarsteer.0.block_output.add.0.vector",
    "sarsteer.1.block_output.add.0.strength",
    "sarsteer.².block_output.add.0.vector",
    "sarsteer.99999999999999999999.nowhere.scale.x.vector",
    "sarsteer.0.block_output.add.0.bias",
    "sarsteer.unsteered.logits",
    "sarsteer.unsteered.",
    "sarsteer.steered.logits",
    "sarsteer.last.mask",
    "steering_strength",
    "steering_positions",
    "steering_prompt_lengths",
    "attention_mask",
    "logits",
    "two\nlines",
    "\x1b[31mred",
    "Error: no\r\nWarning",
    "n" * 5000,
    "\u2028",
)
OPS = (
    "",
    "Add",
    "MatMul",
    "Cast",
    "Identity",
    "If",
    "Loop",
    "Constant",
    "Softmax",
    "DequantizeLinear",
    "NoSuchOp",
)
OPS += (
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "LayerNormalization",
    "Shape",
    "Two\nLines",
)
NUMBERS = (0, 1, -1, 2, 3, 17, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
DIMS: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (-1,),
    (2**62,),
    (2**62, 2**62),
    (2**31, 2**33, 0),
    (1,) * 70,
    (1, 1, 2**40),
)
TEXTS = ("", "garbage", "AAAA", "====", "CgA=", "é", "{", "-1", "²", "0", "9" * 5000, "a\nb", "/w9/")
NODE_KEYS = ("sarsteer.original", "sarsteer.split_from", "sarsteer.call", "sarsteer.opened")
NODE_KEYS += ("pkg.torch.onnx.name_scopes",)
MODEL_KEYS = ("sarsteer.plan_sha256", "sarsteer.constants_sha256", "sarsteer.model_fingerprint")
LOCATIONS = (
    "../outside/secret.bin",
    "/etc/hostname",
    "missing.bin",
    "weights.bin",
    "link.bin",
    "loop.bin",
    "folder",
    "decoder.onnx",
    "steered.onnx",
    "steered.onnx.data",
    "plan.safetensors",
    "",
    ".",
    "a\nb",
    "nul\0",
    "weights.bin/below",
    "n" * 5000,
)
DEPTHS = (1, 2, 5, 20, 60, 150, 400)
"""Bodies within bodies: protobuf reads about 100 levels, two of which each body takes."""


def picked(values: Sequence[T], pick: int) -> T:
    return values[pick % len(values)]


def graphs(model: ModelProto) -> list[GraphProto]:
    """The graph and the bodies of its nodes, all depths."""

    def bodies(nodes: Sequence[NodeProto]) -> Iterator[GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield attribute.g
                    yield from bodies(attribute.g.node)

    return [model.graph, *bodies(model.graph.node)]


def places(model: ModelProto) -> list[GraphProto | FunctionProto]:
    """Everything that holds nodes: the graph twice, because most structure is there, its bodies, functions."""
    return [model.graph, *graphs(model), *model.functions]


def nodes_of(model: ModelProto, pick: int) -> Any:
    return picked(places(model), pick).node


def node_of(model: ModelProto, pick: int, other: int) -> NodeProto | None:
    nodes = nodes_of(model, other)
    return picked(nodes, pick) if len(nodes) else None


def reordered(nodes: Any, order: Sequence[int]) -> None:
    rewritten = GraphProto(node=[nodes[position] for position in order])  # keeps copies
    del nodes[:]
    nodes.extend(rewritten.node)


def drop_node(model: ModelProto, pick: int, other: int) -> None:
    nodes = nodes_of(model, other)
    if len(nodes):
        del nodes[pick % len(nodes)]


def duplicate_node(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, other)) is not None:
        nodes_of(model, other).append(node)


def swap_nodes(model: ModelProto, pick: int, other: int) -> None:
    nodes = nodes_of(model, 0)
    order = list(range(len(nodes)))
    if order:
        one, two = pick % len(order), other % len(order)
        order[one], order[two] = order[two], order[one]
        reordered(nodes, order)


def reverse_nodes(model: ModelProto, pick: int, other: int) -> None:
    nodes = nodes_of(model, pick)
    reordered(nodes, range(len(nodes))[::-1])


def drop_all_nodes(model: ModelProto, pick: int, other: int) -> None:
    del nodes_of(model, pick)[:]


def change_op(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, 0)) is not None:
        node.op_type = picked(OPS, other)


def change_domain(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, 0)) is not None:
        node.domain = picked(("", "com.microsoft", "nowhere", "a\nb"), other)


def rename_node(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, 0)) is not None:
        node.name = picked(NAMES, other)


def tensor_names(model: ModelProto) -> list[str]:
    graph = model.graph
    named = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    return named + [name for node in graph.node for name in node.output] or [""]


def rename_tensor(model: ModelProto, pick: int, other: int) -> None:
    """A hostile name, given everywhere alike: the graph stays whole."""
    old, new = picked(tensor_names(model), pick), picked(NAMES, other)
    for graph in graphs(model):
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            if entry.name == old:
                entry.name = new


def rename_output(model: ModelProto, pick: int, other: int) -> None:
    """What reads the tensor still asks for the old name."""
    node = node_of(model, pick, 0)
    if node is not None and node.output:
        node.output[other % len(node.output)] = picked(NAMES, pick + other)


def redirect_input(model: ModelProto, pick: int, other: int) -> None:
    """Reads another tensor: a cycle where that is computed later."""
    node = node_of(model, pick, 0)
    if node is not None and node.input:
        node.input[other % len(node.input)] = picked(tensor_names(model), other)


def read_itself(model: ModelProto, pick: int, other: int) -> None:
    node = node_of(model, pick, other)
    if node is not None and node.input and node.output:
        node.input[0] = node.output[0]


def swap_inputs(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, other)) is not None:
        node.input[:] = list(node.input)[::-1]


def drop_inputs(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, 0)) is not None:
        del node.input[other % (len(node.input) + 1) :]


def empty_input(model: ModelProto, pick: int, other: int) -> None:
    node = node_of(model, pick, 0)
    if node is not None and node.input:
        node.input[other % len(node.input)] = ""


def add_inputs(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, 0)) is not None:
        node.input.extend([picked(tensor_names(model), other)] * (1 + other % 9))


def drop_outputs(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, other)) is not None:
        del node.output[:]


def duplicate_output(model: ModelProto, pick: int, other: int) -> None:
    node, another = node_of(model, pick, 0), node_of(model, other, 0)
    if node is not None and another is not None:
        node.output.extend(another.output)


def drop_attributes(model: ModelProto, pick: int, other: int) -> None:
    having = [node for node in nodes_of(model, other) if node.attribute]
    if having:
        del picked(having, pick).attribute[:]


def retype_attribute(model: ModelProto, pick: int, other: int) -> None:
    """Says that it is of another type than what it holds."""
    having = [node for node in nodes_of(model, 0) if node.attribute]
    if having:
        attribute = picked(having, pick).attribute[0]
        attribute.type = picked(list(AttributeProto.AttributeType.values()), other)


def number_attribute(model: ModelProto, pick: int, other: int) -> None:
    having = [node for node in nodes_of(model, 0) if node.attribute]
    if having:
        attribute = picked(having, pick).attribute[0]
        attribute.i, attribute.f = picked(NUMBERS, other), picked((float("nan"), float("inf"), 0.0), other)
        attribute.s = b"\xff\xfe"


def nest_bodies(model: ModelProto, pick: int, other: int) -> None:
    """Bodies in bodies in an attribute, with a matrix product at the bottom."""
    node = node_of(model, pick, 0)
    if node is None:
        return
    body, known = GraphProto(name="bottom"), model.graph.input[0].name if model.graph.input else ""
    body.node.add(op_type=picked(("MatMul", "Identity"), pick), input=[known, known], output=["b"])
    body.output.add(name="b")
    for _ in range(picked(DEPTHS, other)):
        outer = GraphProto(name="outer")
        branch = outer.node.add(op_type="If", input=[known], output=["b"])
        branch.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g.CopyFrom(body)
        outer.output.add(name="b")
        body = outer
    for name in ("then_branch", "else_branch")[: 1 + pick % 2]:
        node.attribute.add(name=name, type=AttributeProto.GRAPH).g.CopyFrom(body)


def node_metadata(model: ModelProto, pick: int, other: int) -> None:
    if (node := node_of(model, pick, pick + other)) is not None:
        node.metadata_props.add(key=picked(NODE_KEYS, other), value=picked(TEXTS, pick + other))


def garble_node_metadata(model: ModelProto, pick: int, other: int) -> None:
    having = [node for graph in graphs(model) for node in graph.node if node.metadata_props]
    ours = [node for node in having if any(entry.key.startswith("sarsteer") for entry in node.metadata_props)]
    if having:
        entry = picked(picked(ours or having, pick).metadata_props, other)
        entry.value = picked(TEXTS, other)


def drop_initializer(model: ModelProto, pick: int, other: int) -> None:
    if model.graph.initializer:
        del model.graph.initializer[pick % len(model.graph.initializer)]


def steering_or_any(model: ModelProto, pick: int, other: int) -> TensorProto | None:
    """An initializer, of ours every other time where there are some."""
    every = list(model.graph.initializer)
    ours = [tensor for tensor in every if tensor.name.startswith("sarsteer.")]
    chosen = ours if ours and other % 2 else every
    return picked(chosen, pick) if chosen else None


def retype_initializer(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        tensor.data_type = picked((0, 1, 6, 7, 8, 10, 11, 14, 16, 20, 21, 23, 99, -1), other // 2)


def resize_initializer(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        tensor.dims[:] = picked(DIMS, other // 2)


def reshape_initializer(model: ModelProto, pick: int, other: int) -> None:
    """Other dimensions of as many elements: nothing in the tensor contradicts them."""
    if (tensor := steering_or_any(model, pick, other)) is not None:
        size = 1
        for dim in tensor.dims:
            size *= dim
        tensor.dims[:] = picked(
            ((size,), (1, size), (size, 1), (1, 1, size), (*tensor.dims[::-1],)), other // 2
        )


def damage_values(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        raw = tensor.raw_data
        tensor.raw_data = picked((b"", raw[:-1], raw * 2, b"\xff" * len(raw), b"\0" * len(raw)), other // 2)


def duplicate_initializer(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        model.graph.initializer.append(tensor)


def rename_initializer(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        tensor.name = picked(NAMES, other // 2)


def add_initializer(model: ModelProto, pick: int, other: int) -> None:
    """One more tensor, under a name that we may give."""
    tensor = model.graph.initializer.add(name=picked(NAMES, pick), data_type=TensorProto.FLOAT, dims=[1])
    tensor.raw_data = picked((b"\0\0\0\0", b"\xff\xff\xff\xff"), other)


def outside_initializer(model: ModelProto, pick: int, other: int) -> None:
    """Says that its values are in a file."""
    if (tensor := steering_or_any(model, pick, other)) is not None:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": picked(LOCATIONS, other // 2), "length": str(size)}
        entries["offset"] = picked(("0", "4096", "-1", str(2**62), "x"), pick)
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)


def relocate(model: ModelProto, pick: int, other: int) -> None:
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if outside:
        entry = picked(picked(outside, pick).external_data, other)
        texts = LOCATIONS if entry.key == "location" else ("", "-1", "1", str(2**62), "9" * 5000, "٣", "1e3")
        entry.value = picked(texts, pick + other)


def make_sparse(model: ModelProto, pick: int, other: int) -> None:
    if (tensor := steering_or_any(model, pick, other)) is not None:
        model.graph.sparse_initializer.add(dims=[2**40]).values.CopyFrom(tensor)


def ports(model: ModelProto, pick: int) -> Any:
    graph = picked(graphs(model), pick)
    return picked((graph.input, graph.output, graph.output, graph.value_info), pick)


def drop_port(model: ModelProto, pick: int, other: int) -> None:
    values = ports(model, other)
    if len(values):
        del values[pick % len(values)]


def drop_ports(model: ModelProto, pick: int, other: int) -> None:
    del ports(model, pick)[:]


def duplicate_port(model: ModelProto, pick: int, other: int) -> None:
    values = ports(model, other)
    if len(values):
        values.append(picked(values, pick))


def rename_port(model: ModelProto, pick: int, other: int) -> None:
    values = ports(model, other)
    if len(values):
        picked(values, pick).name = picked(NAMES, pick + other)


def add_port(model: ModelProto, pick: int, other: int) -> None:
    value = ports(model, other).add(name=picked(NAMES, pick))
    value.type.tensor_type.elem_type = picked((TensorProto.FLOAT, TensorProto.INT64, 99, 0), other)


def retype(value: ValueInfoProto, pick: int) -> None:
    """An absurd type for a tensor."""
    kind = pick % 12
    tensor = value.type.tensor_type
    if kind < 3:
        tensor.elem_type = picked((99, 0, -1), kind)
    elif kind == 3:
        tensor.ClearField("shape")
    elif kind == 4:
        for _ in range(1000):
            tensor.shape.dim.add(dim_value=2)
    elif kind == 5:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 6:
        value.type.map_type.key_type = 7
    elif kind == 7:
        value.ClearField("type")
    elif tensor.shape.dim:
        last = tensor.shape.dim[-1]
        if kind == 8:
            last.dim_value = picked(NUMBERS, pick // 12)
        elif kind == 9:
            last.dim_param = picked(TEXTS, pick // 12)
        elif kind == 10:
            last.Clear()
        else:
            tensor.shape.dim.add(dim_param="more")


def retype_port(model: ModelProto, pick: int, other: int) -> None:
    values = ports(model, other)
    if len(values):
        retype(picked(values, pick), other)


def retype_computed(model: ModelProto, pick: int, other: int) -> None:
    """What the file says of a tensor that a node computes: the stream's types are read from there."""
    if model.graph.value_info:
        retype(picked(model.graph.value_info, pick), other)


def describe_tensor(model: ModelProto, pick: int, other: int) -> None:
    """A type for a tensor of which the file said nothing, or a second one."""
    value = model.graph.value_info.add(name=picked(tensor_names(model), pick))
    value.type.tensor_type.elem_type = 1
    for _ in range(3):
        value.type.tensor_type.shape.dim.add(dim_value=16)
    retype(value, other)


def ir_version(model: ModelProto, pick: int, other: int) -> None:
    model.ir_version = picked(NUMBERS, pick)


def opset_version(model: ModelProto, pick: int, other: int) -> None:
    if model.opset_import:
        picked(model.opset_import, other).version = picked((*NUMBERS, 6, 7, 11, 12, 16, 99), pick)


def opset_domains(model: ModelProto, pick: int, other: int) -> None:
    if pick % 3 == 0:
        del model.opset_import[:]
    elif pick % 3 == 1:
        model.opset_import.add(domain="", version=picked(NUMBERS, other))
    else:
        model.opset_import.add(domain=picked(("nowhere", "ai.onnx", "a\nb"), other), version=1)


def model_metadata(model: ModelProto, pick: int, other: int) -> None:
    model.metadata_props.add(key=picked((*MODEL_KEYS, *NAMES), pick), value=picked(TEXTS, other))


def garble_model_metadata(model: ModelProto, pick: int, other: int) -> None:
    if model.metadata_props:
        entry = picked(model.metadata_props, pick)
        if other % 2:
            entry.key = picked(NAMES, other // 2)
        else:
            entry.value = picked(TEXTS, other // 2)


def damage_function(model: ModelProto, pick: int, other: int) -> None:
    if not model.functions:
        return
    position, kind = pick % len(model.functions), other % 7
    function = model.functions[position]
    if kind == 0:
        del model.functions[position]
    elif kind == 1:
        model.functions.append(function)
    elif kind == 2:  # calls itself
        function.node.add(op_type=function.name, domain=function.domain, input=[], output=["again"])
    elif kind == 3:
        function.output.append(picked(NAMES, other))
    elif kind == 4:
        function.input.append(picked(NAMES, other))
    elif kind == 5:
        del function.output[:]
    else:
        function.name = picked(NAMES, other)


def add_function(model: ModelProto, pick: int, other: int) -> None:
    """A function that takes over what a node does; every other time, it calls itself."""
    node = node_of(model, pick, 0)
    if node is None:
        return
    function = model.functions.add(name=node.op_type, domain=node.domain)
    function.input.extend(["x", "y"])
    function.output.append("z")
    function.node.add(
        op_type=picked((node.op_type, "Add"), other), domain=node.domain, input=["x"], output=["z"]
    )
    if other % 3:
        function.opset_import.add(domain="", version=picked((17, 1, 99), other))


MUTATIONS: dict[str, Mutate] = {
    mutate.__name__: mutate
    for mutate in (
        drop_node, duplicate_node, swap_nodes, reverse_nodes, drop_all_nodes, change_op, change_domain, rename_node,
        rename_tensor, rename_output, redirect_input, read_itself, swap_inputs, drop_inputs, empty_input, add_inputs,
        drop_outputs, duplicate_output, drop_attributes, retype_attribute, number_attribute, nest_bodies,
        node_metadata, garble_node_metadata, drop_initializer, retype_initializer, resize_initializer,
        reshape_initializer, damage_values, duplicate_initializer, rename_initializer, add_initializer,
        outside_initializer, relocate, make_sparse, drop_port, drop_ports, duplicate_port, rename_port, add_port,
        retype_port, retype_computed, describe_tensor, ir_version, opset_version, opset_domains, model_metadata,
        garble_model_metadata, damage_function, add_function,
    )
}  # fmt: skip
"""Every mutation of a graph by its name."""


def damaged_bytes(raw: bytes, kind: str, pick: int, other: int) -> bytes:
    """Damage to the bytes of a file, whatever its format."""
    at = pick % (len(raw) + 1)
    if kind == "truncate":
        return raw[:at]
    if kind == "flip":
        damaged = bytearray(raw)
        for number in range(1 + other % 4):
            if damaged:
                damaged[(at * (number + 1)) % len(damaged)] ^= 1 << (other + number) % 8
        return bytes(damaged)
    if kind == "insert":
        return raw[:at] + b"\xff" * (1 + other % 9) + raw[at:]
    if kind == "append":
        return raw + picked((b"\0", b"\n", raw, b"\xff" * 64), other)
    if kind == "noise":  # a linear congruential generator: the same bytes everywhere
        state, noise = pick, bytearray()
        for _ in range(other % 4096):
            state = (state * 1103515245 + 12345) % 2**31
            noise.append(state >> 16 & 255)
        return bytes(noise)
    assert kind == "text"
    return picked((b"", b"\0", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"), pick)


BYTE_KINDS = ("flip", "truncate", "insert", "append", "noise", "text")
