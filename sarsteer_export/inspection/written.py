"""What an inspection of a decoder writes beside its answer: a file of its sites, a picture of a block."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, SiteNotFoundError, UnsupportedError
from calibration.plan import Site
from graph_passes.block_structure import block_sums, final_norm
from graph_passes.named_sites import check_flat, sites_skeleton
from graph_passes.onnx_file import read_graph
from graph_passes.residual_stream import find_residual_stream, find_residual_streams
from graph_passes.scopes import Scope
from graph_passes.sites_file import sites_content, write_sites
from graph_passes.stream_table import stream_table
from sarsteer_export.block_picture import BlockView, draw_block
from sarsteer_export.decoder_file import check_output_name
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.staging import check_output, staged_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnx import ModelProto


@dataclass(frozen=True)
class FilesToWrite:
    """Where an inspection writes what it found, if anywhere: `sites` and `picture`; `block`: which one to draw."""

    sites: Path | None = None
    picture: Path | None = None
    block: int | None = None


def with_files(found: Inspection, decoder: Path, files: FilesToWrite, *, overwrite: bool) -> Inspection:
    """Write the sites of an ONNX decoder and a picture of a block, and say so; both or, where one fails, none.

    Raises what `sites_of` and `block_view` do.
    """
    if files.sites is None and files.picture is None:
        return found
    model, content, lines = _graph(decoder), dict(found.content), [found.text]
    with ExitStack() as staging:
        if files.picture is not None:
            view = block_view(model, decoder.name, files.block)
            staged = staging.enter_context(staged_file(files.picture, overwrite=overwrite))
            staged.write_text(draw_block(view), encoding="utf-8")
            content["picture"] = {"file": str(files.picture), "block": view.layer}
            lines.append(f"block {view.layer} -> {files.picture}")
        if files.sites is not None:
            sites, said = sites_of(model)
            write_sites(sites, staging.enter_context(staged_file(files.sites, overwrite=overwrite)))
            content["sites_file"] = str(files.sites)
            lines.append(f"sites -> {files.sites}, {said}")
    return Inspection(content, "\n".join(lines))


def sites_of(model: ModelProto) -> tuple[dict[str, Any], str]:
    """The sites of a decoder as a sites file has them, or a skeleton with candidates; and which of the two it is.

    Raises `UnsupportedError` for a merged decoder, whose bodies one file of sites cannot describe.
    """
    check_flat(model)
    try:
        return sites_content(find_residual_stream(model)), "complete"
    except (SiteNotFoundError, UnsupportedError) as error:
        content = sites_skeleton(Scope().view(model), str(error))
        return content, f"to be completed by hand from {len(content['candidates'])} candidates"


def block_view(model: ModelProto, name: str, layer: int | None) -> BlockView:
    """What there is to draw of a block of the graph called `name`: `layer`, or the first that is steered, or block 0.

    Of a merged decoder the first body is drawn; the others hold the same blocks, and the same edits. Raises
    `SiteNotFoundError` when the residual stream is not found, `InputError` when there is no such block.
    """
    scope, stream = next(iter(find_residual_streams(model).items()))
    model = scope.view(model)
    table = stream_table(model, stream)
    blocks = len(stream.blocks)
    if layer is None:
        layer = next((row.layer for row in table.rows if row.edits), 0)
    if not 0 <= layer < blocks:
        raise InputError(f"--block is {layer}; the decoder has blocks 0 to {blocks - 1}")
    rows = {(row.layer, row.site): row for row in table.rows}
    last = layer == blocks - 1
    return BlockView(
        name=f"{name}, {scope}" if str(scope) else name,
        layer=layer,
        blocks=blocks,
        hidden_size=stream.hidden_size,
        entry=rows[layer, Site.BLOCK_INPUT.value],
        exit=rows[layer, Site.BLOCK_OUTPUT.value],
        sums=block_sums(model, stream, layer),
        final_norm=final_norm(model, stream) if last else None,
        final=rows.get((layer, Site.FINAL_NORM_OUTPUT.value)),
        shared=table.shared,
    )


def check_outputs(decoder: Path, outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise `InputError` when one of the files to write exists, is named twice, or is the decoder or its weights."""
    for number, output in enumerate(outputs):
        check_output(output, overwrite=overwrite)
        if output.resolve() in {decoder.resolve(), *(other.resolve() for other in outputs[:number])}:
            raise InputError(f"{output}: is read, or written twice; name another output")
        if output.resolve().parent == decoder.resolve().parent:
            check_output_name(_graph(decoder), decoder, output)


def _graph(path: Path) -> ModelProto:
    if path.suffix != ".onnx":
        raise InputError(f"--sites and --svg need an ONNX decoder (.onnx); {path} is none")
    return read_graph(path)
