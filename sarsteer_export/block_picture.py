"""A picture of one decoder block, before and after steering: the residual stream as a trunk, all else beside it.

Both sides keep the same heights, so that an edit on the right stands where the trunk is bare on the left.
Dimensions: B batch, S sequence of this forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.names import STEERED_PREFIX
from graph_passes.stream_table import makers, shared_tensors
from sarsteer_export.inspection.stream_text import constant_text, shared_name, shared_source, shared_text
from sarsteer_export.picture_colours import DARK, LIGHT
from sarsteer_export.svg import Drawing, text_width

if TYPE_CHECKING:
    from graph_passes.block_structure import Part, ResidualSum
    from graph_passes.edits_in_graph import EditInGraph, EditNode
    from graph_passes.stream_table import SharedNode, SiteRow

MARGIN, GAP, TOP = 24, 24, 106
TRUNK = 40
"""How far the trunk stands from the left edge of its panel."""
BRANCH, BOX_WIDTH, BOX_GAP = 56, 280, 16
"""Where branches begin right of the trunk; the width of a box; what separates branches of parallel blocks."""
LINE = 16
EDIT_WIDTH, OP_WIDTH, ROW = 470, 78, 34
UNREAD = ("its wiring was not understood",)
SIGNS = {"Add": "+", "Sub": "−", "Sum": "+", "Mul": "×"}


@dataclass(frozen=True)
class BlockView:
    """All that is drawn of a block. `final_norm` and `final` stand behind the last block only."""

    name: str
    layer: int
    blocks: int
    hidden_size: int
    entry: SiteRow
    exit: SiteRow
    sums: tuple[ResidualSum, ...]
    final_norm: Part | None
    final: SiteRow | None
    shared: tuple[SharedNode, ...]

    @property
    def edits(self) -> tuple[EditInGraph, ...]:
        """The edits that act in this block, in order."""
        return self.entry.edits + self.exit.edits + (self.final.edits if self.final else ())


def draw_block(view: BlockView) -> str:
    """The picture as SVG: once for a block without edits, else before and after side by side."""
    steered = bool(view.edits)
    columns = max([1, *(len(total.branches) for total in view.sums)])
    plain = TRUNK + BRANCH + columns * BOX_WIDTH + (columns - 1) * BOX_GAP + MARGIN
    wide = max(plain, TRUNK + BRANCH + EDIT_WIDTH + MARGIN)
    drawing = Drawing(
        f"Block {view.layer} of {view.name}",
        f"Decoder block {view.layer} of {view.blocks} as a trunk with branches"
        + (f", before and after its edits: {len(view.edits)}." if steered else "; it is not steered."),
    )
    panels = [(plain, False), (wide, True)] if steered else [(plain, False)]
    bottom = max(_Panel(Drawing("", ""), view, 0, width, edits=edits).draw() for width, edits in panels)
    total_width = 2 * MARGIN + sum(width for width, _ in panels) + GAP * (len(panels) - 1)
    drawing.rect((0, 0, total_width, bottom + 2 * MARGIN), "page", radius=12)
    room = total_width - 2 * MARGIN
    heading = f"Decoder block {view.layer} (of 0 to {view.blocks - 1})"
    drawing.text((MARGIN, 40), heading, "strong", size=18, width=room)
    drawing.text((MARGIN, 61), view.name, "muted", size=12, width=room)
    legend = f"[B, S, {view.hidden_size}]: batch, sequence of this pass, width"
    drawing.text((MARGIN, 78), legend, "muted", size=12, width=room)
    x = float(MARGIN)
    for width, edits in panels:
        drawing.rect((x, TOP - 12, width, bottom - TOP + 24), "panel", radius=10)
        said = (
            ("after steering" if edits else "before steering")
            if steered
            else "not steered: no edit acts here"
        )
        drawing.text((x + 16, TOP + 14), said, "edit-title" if edits else "strong", size=13)
        _Panel(drawing, view, x, width, edits=edits).draw()
        x += width + GAP
    return drawing.to_svg(total_width, bottom + 2 * MARGIN, LIGHT, DARK)


class _Panel:
    """Draws the block from top to bottom; `y` is where the next thing begins."""

    def __init__(self, drawing: Drawing, view: BlockView, x: float, width: float, *, edits: bool) -> None:
        self.drawing, self.view, self.edits = drawing, view, edits
        self.left, self.width = x, width
        self.trunk = x + TRUNK
        self.y = TOP + 34.0

    def draw(self) -> float:
        """Draw, and say where the panel ends."""
        start = self.y
        view = self.view
        end = self._height()
        self.drawing.path([(self.trunk, start), (self.trunk, end - 6)], "trunk")
        self._site(view.entry, "block_input")
        for total in view.sums:
            self._sum(total)
        if not view.sums:
            self.y += 20 + self._box(self.trunk + BRANCH, BOX_WIDTH, "other", "block", UNREAD)
        self._site(view.exit, "block_output")
        if view.final is not None and view.final_norm is not None:
            self.y += 10
            height = self._box(
                self.trunk - 20,
                BOX_WIDTH + BRANCH,
                "norm",
                f"final {view.final_norm.title}",
                view.final_norm.details,
            )
            self.y += height + 16
            self._site(view.final, "final_norm_output")
        self.drawing.path([(self.trunk, self.y), (self.trunk, self.y + 22)], "trunk", arrow=11)
        self.y += 40
        self._masks()
        return self.y

    def _height(self) -> float:
        """Where the trunk ends."""
        view, y = self.view, self.y
        rows = [view.entry, view.exit] + ([view.final] if view.final and view.final_norm else [])
        y += sum(_site_height(row) for row in rows)
        y += sum(_sum_height(total) for total in view.sums) or _box_height(UNREAD) + 20
        if view.final is not None and view.final_norm is not None:
            y += 26 + _box_height(view.final_norm.details)
        return y + 22

    def _site(self, row: SiteRow, name: str) -> None:
        """The edits of a site, where they are drawn, and the site itself."""
        if row.edits and self.edits:
            made = "the graph's input" if row.producer is None else f"from {row.producer.name}"
            if row.site == "block_input" and row.layer:
                made = f"from block {row.layer - 1}"
            room = self.width - TRUNK - 28
            self.drawing.text(
                (self.trunk + 18, self.y + 12), made, "muted", size=11, family="mono", width=room
            )
            self.y += 22
            for edit in row.edits:
                self._edit(edit)
        elif row.edits:
            self.y += 22 + sum(_edit_height(edit) for edit in row.edits)
        tensor = row.tensor if self.edits else row.tensor.removeprefix(STEERED_PREFIX)
        steered = bool(row.edits) and self.edits
        self.drawing.circle(self.trunk, self.y + 16, 7, "site-steered" if steered else "site")
        x, room = self.trunk + 18, self.width - TRUNK - 18 - 12
        self.drawing.text((x, self.y + 13), name + (" · steered" if steered else ""), "strong", size=13)
        shape = f"{row.dtype} [B, S, {self.view.hidden_size}]"
        shape_width = text_width(shape, 11.5, "mono")
        name_room = room - shape_width - 14
        self.drawing.text((x, self.y + 30), tensor, "name", size=11.5, family="mono", width=name_room)
        shown = min(text_width(tensor, 11.5, "mono"), name_room)
        self.drawing.text((x + shown + 14, self.y + 30), shape, "muted", size=11.5, family="mono")
        self.y += 44

    def _sum(self, total: ResidualSum) -> None:
        """A fork of the trunk, the branches' boxes, and the add that brings them back."""
        draw, x = self.drawing, self.trunk + BRANCH
        fork = self.y + 8
        columns = [x + number * (BOX_WIDTH + BOX_GAP) for number in range(len(total.branches))]
        centres = [column + BOX_WIDTH / 2 for column in columns]
        top = fork + 20
        if total.shared is not None:
            self.y = top
            width = columns[-1] + BOX_WIDTH - x
            draw.path([(self.trunk, fork), (x + width / 2, fork), (x + width / 2, top)], "line", arrow=7)
            top += self._box(x, width, "norm", total.shared.title, total.shared.details)
            for centre in centres:
                draw.path([(centre, top), (centre, top + 18)], "line", arrow=7)
            top += 18
        else:
            for centre in centres:
                draw.path([(self.trunk, fork), (centre, fork), (centre, top)], "line", arrow=7)
        join = self.y = self.y - (self.y - fork) - 8 + _sum_height(total) - 34
        for column, centre, parts in zip(columns, centres, total.branches, strict=True):
            self.y = top
            for number, part in enumerate(parts):
                if number:
                    draw.path([(centre, self.y - 14), (centre, self.y)], "line", arrow=7)
                self.y += self._box(column, BOX_WIDTH, part.kind, part.title, part.details) + 14
            draw.path([(centre, self.y - 14), (centre, join), (self.trunk + 12, join)], "line", arrow=8)
        self._joint(join, "−" if total.op == "Sub" else "+", "joint")
        room = self.width - TRUNK - 18 - 12
        draw.text((self.trunk + 18, join + 17), total.name, "muted", size=11, family="mono", width=room)
        self.y = join + 34

    def _edit(self, edit: EditInGraph) -> None:
        """An edit as a card: a row for each of its nodes, the last of which stands on the trunk."""
        draw, x = self.drawing, self.trunk + BRANCH
        height = _edit_height(edit)
        draw.rect((x - 14, self.y, EDIT_WIDTH + 14, height - 12), "edit")
        place = {"all": "all positions", "last": "last positions"}.get(edit.positions, edit.positions)
        draw.text((x, self.y + 19), f"{edit.op} · {place}", "edit-title", size=13)
        title = text_width(f"{edit.op} · {place}", 13) + 16
        room = EDIT_WIDTH - title - 10
        draw.text((x + title, self.y + 19), edit.name, "muted", size=10, family="mono", width=room)
        y = self.y + 30
        for number, node in enumerate(edit.nodes):
            last = number == len(edit.nodes) - 1
            self._edit_row(node, y, last=last, inserted=edit.inserted)
            if not last:
                target = y + ROW + (ROW - 10) / 2 if number == len(edit.nodes) - 2 else y + ROW
                self._edit_link(edit, number, y, target)
            y += ROW
        if not edit.inserted:
            own = f"in the bias of {edit.nodes[-1].name or edit.nodes[-1].op}"
            draw.text((x, y + 7), own, "muted", size=10.5, family="mono", width=EDIT_WIDTH - 10)
        self.y += height

    def _edit_row(self, node: EditNode, y: float, *, last: bool, inserted: bool) -> None:
        draw, x, middle = self.drawing, self.trunk + BRANCH, y + (ROW - 10) / 2
        inputs = [(shared_name(name), "mask") for name in node.shared]
        inputs += [(constant_text(constant), "constant") for constant in node.constants]
        named = node.op not in SIGNS or not inserted or not last
        if last:
            self._joint(middle, SIGNS.get(node.op, "•") if inserted else "•", "joint-steered")
            start = x if named else x + OP_WIDTH + 12 if inputs else x + OP_WIDTH / 2
            draw.path([(start, middle), (self.trunk + 12, middle)], "edit-line", arrow=8)
        if named:
            self._op(node.op if inserted or not last else "bias", y)
        if not last and node.reads_stream:
            draw.path([(self.trunk, middle), (x, middle)], "edit-line", arrow=8)
        self._pills(x + OP_WIDTH + 12, y, inputs, room=EDIT_WIDTH - OP_WIDTH - 24, joined=named)

    def _op(self, op: str, y: float) -> None:
        x, middle = self.trunk + BRANCH, y + (ROW - 10) / 2
        self.drawing.rect((x, y, OP_WIDTH, ROW - 10), "edit-op", radius=5)
        at = (x + OP_WIDTH / 2, middle + 4)
        self.drawing.text(at, op, "strong", size=11.5, anchor="middle", width=OP_WIDTH - 4)

    def _edit_link(self, edit: EditInGraph, number: int, y: float, target: float) -> None:
        """From a node down to the next, or to the trunk, when the next one reads what it computes."""
        name = edit.nodes[number].name
        x = self.trunk + BRANCH + OP_WIDTH / 2
        if name not in edit.nodes[number + 1].own:
            return
        arrow = 0 if number == len(edit.nodes) - 2 else 6
        self.drawing.path([(x, y + ROW - 10), (x, target)], "edit-line", arrow=arrow)

    def _pills(self, x: float, y: float, inputs: list[tuple[str, str]], *, room: float, joined: bool) -> None:
        draw, middle = self.drawing, y + (ROW - 10) / 2
        if inputs and joined:
            draw.path([(x, middle), (x - 12, middle)], "edit-line", arrow=6)
        for text, kind in inputs:
            width = min(text_width(text, 10.5, "mono") + 14, room)
            draw.rect((x, y + 2, width, ROW - 14), kind, radius=10)
            draw.text((x + 7, middle + 4), text, "name", size=10.5, family="mono", width=width - 13)
            x, room = x + width + 6, room - width - 6

    def _masks(self) -> None:
        """What the edits of this block share, listed once."""
        for tensor in shared_tensors(self.view.edits):
            ops = [node.op for node in makers(self.view.shared, tensor)]
            lines = [shared_source(self.view.shared, tensor)]
            lines += _wrapped(ops, EDIT_WIDTH + BRANCH - 10, 10.5, joint=", ") if ops else []
            height = 30 + LINE * len(lines)
            if self.edits:
                x = self.trunk - 14
                self.drawing.rect((x, self.y, EDIT_WIDTH + 14 + BRANCH, height), "mask")
                title = shared_text(self.view.shared, tensor)
                room = EDIT_WIDTH + BRANCH - 10
                self.drawing.text((x + 12, self.y + 19), title, "strong", size=11.5, width=room)
                for number, line in enumerate(lines):
                    at = (x + 12, self.y + 37 + LINE * number)
                    self.drawing.text(at, line, "muted", size=10.5, family="mono", width=room)
            self.y += height + 12

    def _joint(self, y: float, sign: str, kind: str) -> None:
        draw, x = self.drawing, self.trunk
        draw.circle(x, y, 11, kind)
        if sign == "•":
            draw.circle(x, y, 3.5, f"{kind}-dot")
            return
        draw.path([(x - 5, y), (x + 5, y)], f"{kind}-sign")
        if sign == "+":
            draw.path([(x, y - 5), (x, y + 5)], f"{kind}-sign")

    def _box(self, x: float, width: float, kind: str, title: str, details: tuple[str, ...]) -> float:
        """A box with a title and details; returns its height."""
        height = _box_height(details)
        self.drawing.rect((x, self.y, width, height), kind)
        middle = x + width / 2
        self.drawing.text((middle, self.y + 20), title, "strong", size=13, anchor="middle", width=width - 16)
        for number, line in enumerate(_detail_lines(details, BOX_WIDTH)):
            at = (middle, self.y + 37 + LINE * number)
            self.drawing.text(at, line, "muted", size=11, anchor="middle", width=width - 12)
        return height


def _box_height(details: tuple[str, ...], width: float = BOX_WIDTH) -> float:
    return 30 + LINE * len(_detail_lines(details, width))


def _sum_height(total: ResidualSum) -> float:
    """From the fork's beginning to where the next thing begins."""
    stacks = [sum(_box_height(part.details) + 14 for part in parts) for parts in total.branches]
    shared = 0 if total.shared is None else _box_height(total.shared.details) + 18
    return 28 + shared + max(stacks) + 4 + 34


def _edit_height(edit: EditInGraph) -> float:
    return 30 + ROW * len(edit.nodes) + 12 + (0 if edit.inserted else LINE)


def _site_height(row: SiteRow) -> float:
    return 44 + (22 + sum(_edit_height(edit) for edit in row.edits) if row.edits else 0)


def _detail_lines(details: tuple[str, ...], width: float) -> list[str]:
    wrapped = [_wrapped(detail.split(", "), width - 8, 11, joint=", ") for detail in details]
    return [line for lines in wrapped for line in lines]


def _wrapped(words: list[str], width: float, size: float, *, joint: str) -> list[str]:
    """Words joined into lines no wider than `width`, each but the last ending with the joint."""
    lines = [words[0]]
    for word in words[1:]:
        longer = lines[-1] + joint + word
        if text_width(longer + joint, size) <= width:
            lines[-1] = longer
        else:
            lines[-1] += joint.rstrip()
            lines.append(word)
    return lines
