"""A small writer of SVG: shapes, lines and text in classes whose colours follow the reader's light or dark scheme."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MONO_ADVANCE, SANS_ADVANCE = 0.605, 0.6
"""Width of a character in sizes of the font: exact for the usual monospaced fonts, wide for the others."""
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that an XML file cannot hold; names in a graph may have them."""
FAMILIES = {
    "sans": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "mono": "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace",
}


def text_width(text: str, size: float, family: str = "sans") -> float:
    """At most how wide a text is, in the units of `size`."""
    return len(text) * size * (MONO_ADVANCE if family == "mono" else SANS_ADVANCE)


def fitted(text: str, width: float, size: float, family: str = "sans") -> str:
    """`text`, its beginning cut where it is wider than `width`."""
    room = int(width / text_width("m", size, family))
    return text if len(text) <= room else "…" + text[len(text) - room + 1 :]


class Drawing:
    """An SVG picture that grows as it is drawn."""

    def __init__(self, title: str, description: str) -> None:
        self.root = ElementTree.Element(
            "svg",
            {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-labelledby": "title description"},
        )
        for tag, name, text in (("title", "title", title), ("desc", "description", description)):
            ElementTree.SubElement(self.root, tag, {"id": name}).text = NOT_XML.sub("\ufffd", text)

    def rect(self, box: tuple[float, float, float, float], kind: str, *, radius: float = 6) -> None:
        """A box (x, y, width, height)."""
        x, y, width, height = box
        self._add("rect", kind, x=x, y=y, width=width, height=height, rx=radius)

    def circle(self, x: float, y: float, radius: float, kind: str) -> None:
        """A circle around (x, y)."""
        self._add("circle", kind, cx=x, cy=y, r=radius)

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, arrow: float = 0) -> None:
        """A line through points; with an arrow head of length `arrow` at its end."""
        self._add("path", kind, d="M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points))
        if arrow:
            (x_before, y_before), (x, y) = points[-2:]
            dx, dy = _sign(x - x_before), _sign(y - y_before)
            back = [
                (x - arrow * dx + side * dy, y - arrow * dy + side * dx) for side in (arrow / 2, -arrow / 2)
            ]
            corners = "L".join(f"{_number(a)} {_number(b)}" for a, b in [(x, y), *back])
            self._add("path", f"{kind} head", d=f"M{corners}Z")

    def text(
        self,
        at: tuple[float, float],
        text: str,
        kind: str,
        *,
        size: float = 12,
        family: str = "sans",
        anchor: str = "start",
        width: float | None = None,
    ) -> None:
        """A line of text with its baseline at `at`; cut to `width`, the whole of it in a tooltip."""
        text = NOT_XML.sub("\ufffd", text)
        shown = text if width is None else fitted(text, width, size, family)
        element = self._add("text", kind, x=at[0], y=at[1])
        element.set("font-size", _number(size))
        element.set("font-family", FAMILIES[family])
        if anchor != "start":
            element.set("text-anchor", anchor)
        element.text = shown
        if shown != text:
            ElementTree.SubElement(element, "title").text = text
            element.text, element[0].tail = None, shown

    def to_svg(self, width: float, height: float, light: Mapping[str, str], dark: Mapping[str, str]) -> str:
        """The picture as a file. `light`, `dark`: CSS declarations by class."""
        self.root.set("viewBox", f"0 0 {_number(width)} {_number(height)}")
        self.root.set("width", _number(width))
        self.root.set("height", _number(height))
        style = ElementTree.Element("style")
        rules = "".join(f".{name}{{{declarations}}}\n" for name, declarations in light.items())
        night = "".join(f".{name}{{{declarations}}}\n" for name, declarations in dark.items())
        style.text = f"\n{rules}@media (prefers-color-scheme: dark) {{\n{night}}}\n"
        self.root.insert(2, style)
        ElementTree.indent(self.root, space=" ")
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"

    def _add(self, tag: str, kind: str, **attributes: float | str) -> ElementTree.Element:
        given = {
            name: value if isinstance(value, str) else _number(value) for name, value in attributes.items()
        }
        return ElementTree.SubElement(self.root, tag, {"class": kind, **given})


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
