"""What an inspection of a decoder writes beside its answer: a file of its sites, a picture of a block."""

from __future__ import annotations

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


def with_sites_file(found: Inspection, decoder: Path, output: Path, *, overwrite: bool) -> Inspection:
    """Write the sites of an ONNX decoder, or a skeleton with candidates where they are not found, and say so.

    Raises `UnsupportedError` for a merged decoder, whose bodies one file of sites cannot describe.
    """
    model = _graph(decoder)
    check_flat(model)
    content: dict[str, Any]
    try:
        content, said = sites_content(find_residual_stream(model)), "complete"
    except (SiteNotFoundError, UnsupportedError) as error:
        content = sites_skeleton(Scope().view(model), str(error))
        said = f"to be completed by hand from {len(content['candidates'])} candidates"
    with staged_file(output, overwrite=overwrite) as staged:
        write_sites(content, staged)
    return Inspection(
        {**found.content, "sites_file": str(output)}, f"{found.text}\nsites -> {output}, {said}"
    )


def with_picture(
    found: Inspection, decoder: Path, output: Path, layer: int | None, *, overwrite: bool
) -> Inspection:
    """Draw a block of an ONNX decoder: block `layer`, or the first that is steered, or block 0.

    Of a merged decoder the first body is drawn; the others hold the same blocks, and the same edits. Raises
    `SiteNotFoundError` when the residual stream is not found, `InputError` when there is no such block.
    """
    view = block_view(_graph(decoder), decoder.name, layer)
    picture = draw_block(view)
    with staged_file(output, overwrite=overwrite) as staged:
        staged.write_text(picture, encoding="utf-8")
    content = {**found.content, "picture": {"file": str(output), "block": view.layer}}
    return Inspection(content, f"{found.text}\nblock {view.layer} -> {output}")


def block_view(model: ModelProto, name: str, layer: int | None) -> BlockView:
    """What there is to draw of a block of the graph called `name`."""
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
