"""The patching benchmark's result for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node_time import Spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MEBIBYTE = 2**20


def table(result: Mapping[str, Any]) -> str:
    """The result for people, as Markdown."""
    hardware = result["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    decoders = list(result["decoders"].values())
    lines = [f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['system']}; {versions}", ""]

    def row(name: str, cells: Sequence[str]) -> None:
        lines.append("| " + " | ".join([name, *cells]) + " |")

    def spread(key: str, digits: int, scale: float = 1) -> list[str]:
        rows = [Spread(*(scale * part for part in found["patching"][key].values())) for found in decoders]
        return [one.text(digits) for one in rows]

    shapes = [found["shape"] for found in decoders]
    row("", [f"{shape['blocks']} blocks of width {shape['width']}" for shape in shapes])
    row("---", ["---"] * len(decoders))
    row("external data, GB (on disk)", [_data(found) for found in decoders])
    row(
        "graph file, MB; nodes", [f"{found['graph_bytes'] / 1e6:.1f}; {found['nodes']}" for found in decoders]
    )
    row("edits", [str(found["edits"]) for found in decoders])
    row("**`sarsteer-export patch`, whole process, s**", spread("command_seconds", 3))
    row("of that, starting Python and importing, s", spread("imports_seconds", 3))
    row("`patch()` alone, s", spread("patch_seconds", 3))
    row("**peak memory above the imports, MiB**", spread("command_above_imports_bytes", 1, 1 / MEBIBYTE))
    row("the same of `patch()`, MiB", spread("patch_above_imports_bytes", 1, 1 / MEBIBYTE))
    row("peak memory of the imports, MiB", spread("imports_rss_bytes", 1, 1 / MEBIBYTE))
    row("read beyond the imports, MB", spread("command_read_bytes", 1, 1e-6))
    row("data file untouched", ["yes" if found["data_untouched"] else "**no**" for found in decoders])
    if any(found["load_whole"] for found in decoders):
        row("`onnx.load` with the weights, once", [_whole(found["load_whole"]) for found in decoders])
    return "\n".join([*lines, "", f"Medians and [quartiles] over {result['runs']} runs."])


def _data(found: Mapping[str, Any]) -> str:
    return f"{found['data_bytes'] / 1e9:.1f} ({found['data_bytes_on_disk'] / 1e9:.1f})"


def _whole(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return str(found["skipped"])
    return f"{found['seconds']:.1f} s, {found['peak_rss_bytes'] / 1e9:.1f} GB"
