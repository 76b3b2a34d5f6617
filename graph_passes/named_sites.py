"""Sites that a person names: checked against the graph, and the candidates to choose them from.

Dimensions: B batch, S sequence of this forward pass, D width of the stream.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import onnx

from calibration.errors import InputError, UnsupportedError
from graph_passes.fused_norms import ZEROS, split_fused_norms
from graph_passes.graph_index import MATMUL_OPS, GraphIndex, describe
from graph_passes.names import is_steering
from graph_passes.residual_add import come_from
from graph_passes.scopes import decoder_scopes
from graph_passes.sites_file import ELEMENT_TYPES, FORMAT, VERSION
from graph_passes.stream_table import dtype_name
from graph_passes.tensor_types import fixed, recorded_types
from graph_passes.transparent import reshaped

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

    from graph_passes.residual_stream import ResidualStream

RANK = 3
"""B, S, D."""
NO_JOINS = MATMUL_OPS | {"Expand", "Reshape", "Slice", "Tile", "Where"}
"""What reads several computed tensors and adds none to another."""
MASK, MASK_RANK = "attention_mask", 2


def check_flat(model: ModelProto) -> None:
    """Raise `UnsupportedError` for a merged decoder: a stream that is given by hand is that of one graph."""
    scopes = decoder_scopes(model)
    if len(scopes) > 1:
        raise UnsupportedError(
            f"the graph is a merged decoder of {len(scopes)} bodies ({', '.join(map(str, scopes))}); sites by hand "
            "are those of one graph: leave out --sites, or export the decoder unmerged"
        )


def check_sites(model: ModelProto, stream: ResidualStream) -> None:
    """Check a stream that was read from a file against the graph it is meant for.

    Every tensor is there, of rank 3, the width and the element type that the file says wherever the graph
    knows them, and every block's output depends on its input, block after block. Raises `InputError` naming
    the field.
    """
    model = split_fused_norms(model)
    index = GraphIndex(model.graph)
    tensors = {
        f"blocks.{block.index}.{side}": getattr(block, side)
        for block in stream.blocks
        for side in ("input", "output")
    }
    if stream.final_norm_output is not None:
        tensors["final_norm_output"] = stream.final_norm_output
    for field, tensor in tensors.items():
        if tensor not in index.producer and tensor not in index.inputs:
            raise InputError(f"{field} is {tensor!r}, which the graph does not compute")
    types = _types(model, list(tensors.values()))
    for field, tensor in tensors.items():
        if tensor in types:
            _check_type(field, tensor, types[tensor], stream)
    _check_order(index, list(tensors.items()))
    for name, _ in stream.other_types:
        if name not in tensors.values():
            raise InputError(f"other_types names {name!r}, which is none of the sites")
    _check_mask(model, index, stream.attention_mask)


def sites_skeleton(model: ModelProto, problem: str) -> dict[str, Any]:
    """The content of a sites file to be completed: what is known, nulls, and the nearest candidates.

    A candidate is what a node makes of a tensor and of something computed from that tensor by a matrix
    product: a residual add, whatever operator it is written with.
    """
    model = split_fused_norms(model)
    index = GraphIndex(model.graph)
    joins = [(node, _forms(index, tensor)) for tensor, node in _joins(index).items()]
    types = _types(model, [form for _, forms in joins for form in forms])
    candidates = [
        (node, fitting[0])
        for node, forms in joins
        if (fitting := [form for form in forms if form not in types or len(_dims(types[form])) == RANK])
    ]
    types = {tensor: types[tensor] for _, tensor in candidates if tensor in types}
    widths = Counter(dims[-1] for dims in map(_dims, types.values()))
    kinds = Counter(dtype_name(kind.tensor_type.elem_type) for kind in types.values())
    hidden_size = next((width for width, _ in widths.most_common() if isinstance(width, int)), None)
    element_type = next((kind for kind, _ in kinds.most_common() if kind in ELEMENT_TYPES), None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "hidden_size": hidden_size,
        "element_type": element_type,
        "attention_mask": MASK if MASK in index.inputs else None,
        "blocks": [{"input": None, "output": None}],
        "final_norm_output": None,
        "other_types": {},
        "problem": problem,
        "candidates": [
            {
                "tensor": tensor,
                "node": describe(node),
                "shape": _dims(types[tensor]) if tensor in types else None,
            }
            for node, tensor in candidates
        ],
    }


def _joins(index: GraphIndex) -> dict[str, NodeProto]:
    """The results of joining a tensor with something computed from it by a matrix product -> the joining nodes.

    The sum of a join and another branch of the same tensor, as in parallel blocks, takes that join's place.
    """
    found: dict[str, NodeProto] = {}
    starts: dict[str, int] = {}
    for node in index.nodes:
        computed = [name for name in dict.fromkeys(node.input) if name and index.is_computed(name)]
        computed = [name for name in computed if not name.startswith(ZEROS)]
        if is_steering(node) or node.op_type in NO_JOINS or len(computed) < 2 or not node.output[0]:
            continue
        for skip in computed:
            origin = reshaped(index, skip)
            others = [name for name in computed if name != skip]
            if come_from(index, others, origin):
                start = index.bit(origin)
            elif origin in starts and all(_is_beside(index, name, origin, starts[origin]) for name in others):
                start = starts[origin]
                found.pop(origin, None)
            else:
                continue
            found[node.output[0]], starts[node.output[0]] = node, start
            break
    return found


def _is_beside(index: GraphIndex, branch: str, join: str, start: int) -> bool:
    """Whether a branch is computed from where `join` started, and not from `join` as its norm is."""
    return bool(
        index.ancestors_through_matmul(branch) & start and not index.ancestors(branch) & index.bit(join)
    )


def _forms(index: GraphIndex, tensor: str) -> list[str]:
    """`tensor`, and what is made of it alone as long as nothing else reads it: a sum may take two operators."""
    forms = [tensor]
    while len(readers := [index.nodes[position] for position in index.consumers[forms[-1]]]) == 1:
        node = readers[0]
        if not node.output or not node.output[0] or node.op_type in MATMUL_OPS:
            break
        if sum(index.is_computed(name) for name in node.input if name) != 1:
            break
        forms.append(node.output[0])
    return forms


def _types(model: ModelProto, tensors: list[str]) -> dict[str, TypeProto]:
    types = recorded_types(model, tensors)
    if len(types) < len(set(tensors)):
        with suppress(Exception):  # whatever is thrown in C++; what stays unknown is not checked
            types = recorded_types(onnx.shape_inference.infer_shapes(model), tensors)
    return types


def _dims(kind: TypeProto) -> list[int | str]:
    """Dimensions as numbers where they are fixed; exporters write those as numbers or as numeric strings."""
    if not kind.tensor_type.HasField("shape"):
        return []
    dims = [dim.dim_value or dim.dim_param or "?" for dim in kind.tensor_type.shape.dim]
    return [dim if isinstance(dim, int) else fixed(dim) or dim for dim in dims]


def _check_type(field: str, tensor: str, kind: TypeProto, stream: ResidualStream) -> None:
    if kind.tensor_type.HasField("shape"):
        dims = _dims(kind)
        if len(dims) != RANK:
            raise InputError(f"{field} is {tensor!r} of shape {dims}; expected [batch, sequence, width]")
        if isinstance(dims[-1], int) and dims[-1] != stream.hidden_size:
            raise InputError(
                f"{field} is {tensor!r} of width {dims[-1]}; hidden_size says {stream.hidden_size}"
            )
    if kind.tensor_type.elem_type != stream.elem_type_of(tensor):
        raise InputError(
            f"{field} is {tensor!r} of type {dtype_name(kind.tensor_type.elem_type)}; the file says "
            f"{dtype_name(stream.elem_type_of(tensor))}; say otherwise under other_types"
        )


def _check_mask(model: ModelProto, index: GraphIndex, mask: str | None) -> None:
    if mask is None:
        return
    if mask not in index.inputs:
        raise InputError(f"attention_mask is {mask!r}, which is no input of the graph; null stands for none")
    kind = recorded_types(model, [mask]).get(mask)
    if kind is not None and kind.tensor_type.HasField("shape") and len(_dims(kind)) != MASK_RANK:
        raise InputError(
            f"attention_mask is {mask!r} of shape {_dims(kind)}; expected [batch, past + sequence]"
        )


def _check_order(index: GraphIndex, tensors: list[tuple[str, str]]) -> None:
    """Each site depends on the one before it; a block's input may be the output of the block before it."""
    for (field_before, before), (field, tensor) in itertools.pairwise(tensors):
        same = before == tensor and field.endswith(".input")
        if not same and (before == tensor or not index.ancestors(tensor) & index.bit(before)):
            raise InputError(f"{field} is {tensor!r}, which does not depend on {field_before}, {before!r}")
