"""The table of the residual stream as lines of text: one a block, one more where it is steered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.plan import Site
from graph_passes.names import STEERING_PREFIX
from graph_passes.stream_table import OUTPUT, makers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graph_passes.edits_in_graph import EditConstant, EditInGraph
    from graph_passes.stream_table import NodeName, SharedNode, SiteRow, StreamTable

NAME_WIDTH = 36
"""Longer names lose their beginning: the end tells one node of an exporter from another."""
SHOWN = 4
"""Readers of a tensor that are named; the rest are counted."""
SHAPES = frozenset({"Shape", "Size"})
"""Readers of a tensor's shape, which no edit reaches."""


def table_lines(table: StreamTable, scope: str = "") -> list[str]:
    """The table for people; `--json` has every name in full. `scope`: the body of a merged decoder it is of."""
    blocks = 1 + max(row.layer for row in table.rows)
    shown = [row for row in table.rows if row.edits or not _repeats(row, table)]
    width = max(len(shorten(row.tensor)) for row in shown)
    dtypes = max(len(row.dtype) for row in shown)
    of = f" of {scope}" if scope else ""
    lines = [f"residual stream{of}: {blocks} blocks of width {table.hidden_size}, {table.dtype}"]
    for row in shown:
        what = f"final norm   {'':6}" if row.site == Site.FINAL_NORM_OUTPUT.value else _where(row)
        readers = _readers(row.consumers)
        lines.append(f"  {what} {shorten(row.tensor):{width}}  {row.dtype:{dtypes}}  read by {readers}")
        lines += [f"    {'':13}steered: {edit_text(edit)}" for edit in row.edits]
    for tensor in table.shared_tensors:
        count = len(makers(table.shared, tensor))
        source = shared_source(table.shared, tensor)
        lines.append(f"  shared by edits: {shared_text(table.shared, tensor)} {source} by {count} nodes")
    return lines


def shorten(name: str, width: int = NAME_WIDTH) -> str:
    """A name cut to `width` characters; its end is kept."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def edit_text(edit: EditInGraph) -> str:
    """An edit as one line: what it does, where, with what, by which nodes."""
    tensors = ", ".join(constant_text(constant) for constant in edit.constants if constant.shape)
    ops = ", ".join(node.op for node in edit.nodes)
    own = edit.nodes[-1]  # the decoder's own node, where none was inserted
    how = f"by {ops}" if edit.inserted else f"in the bias of {own.op} {shorten(own.name)}"
    return f"{edit.op} {edit.positions}  {tensors}  {how}"


def constant_text(constant: EditConstant) -> str:
    """A constant by its key, shape and norm; a scalar by its magnitude."""
    if constant.norm is None:
        return f"{constant.key} in external data"
    if not constant.shape:
        return f"{constant.key} {constant.norm:.4g}"
    return f"{constant.key} {'x'.join(map(str, constant.shape))} norm {constant.norm:.4g}"


def shared_name(tensor: str) -> str:
    """A shared tensor as people call it: `mask last`, `row last`, `strength`."""
    kind, *parts = tensor.removeprefix(STEERING_PREFIX).split(".")
    if kind == "strength":
        return " ".join(["strength", *(f"of edit {part}" for part in parts if part.isdecimal())])
    if parts[-1:] == ["row"]:
        return f"row {kind}"
    return f"mask {kind.replace('_', ':')}" + (", strength ≠ 0" if "active" in parts else "")


def shared_text(shared: Sequence[SharedNode], tensor: str) -> str:
    """A shared tensor by its name, type and shape."""
    name = shared_name(tensor)
    if name.startswith("strength"):
        kind = "float32 [B, 1, 1]"
    elif name.startswith("row"):
        kind = "int64 [B, 1, 1]"
    elif tensor.endswith(".nonzero"):
        kind = "bool [B, 1, 1]"
    else:
        kind = "bool [B, S, 1]" if _values(shared, tensor) else "bool [1, S, 1]"
    return f"{name}: {kind}"


def shared_source(shared: Sequence[SharedNode], tensor: str) -> str:
    """The graph inputs whose values a shared tensor is made from."""
    return f"made once from {', '.join(_values(shared, tensor)) or 'the shape of the stream'}"


def _values(shared: Sequence[SharedNode], tensor: str) -> list[str]:
    nodes = makers(shared, tensor)
    return sorted({name for node in nodes if node.op not in SHAPES for name in node.inputs})


def _repeats(row: SiteRow, table: StreamTable) -> bool:
    """Whether a row is the input of a block that the row before it, the output of the last, shows already."""
    if row.site != Site.BLOCK_INPUT.value:
        return False
    return any(
        other.layer == row.layer - 1 and other.tensor == row.tensor and other.site == Site.BLOCK_OUTPUT.value
        for other in table.rows
    )


def _where(row: SiteRow) -> str:
    return f"block {row.layer:3} {row.site.removeprefix('block_'):6}   "


def _readers(consumers: tuple[NodeName, ...]) -> str:
    readers = [node for node in consumers if node.op not in SHAPES]
    named = [node.op if node.op == OUTPUT else f"{node.op} {shorten(node.name)}" for node in readers[:SHOWN]]
    more = [f"{len(readers) - SHOWN} more"] if len(readers) > SHOWN else []
    return ", ".join(named + more) or "nothing"
