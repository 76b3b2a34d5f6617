"""What an inspection of a decoder writes beside its answer: a file of its sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, SiteNotFoundError, UnsupportedError
from graph_passes.named_sites import sites_skeleton
from graph_passes.onnx_file import read_graph
from graph_passes.residual_stream import find_residual_stream
from graph_passes.sites_file import sites_content, write_sites
from sarsteer_export.inspection.found import Inspection
from sarsteer_export.staging import staged_file

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto


def with_sites_file(found: Inspection, decoder: Path, output: Path, *, overwrite: bool) -> Inspection:
    """Write the sites of an ONNX decoder, or a skeleton with candidates where they are not found, and say so."""
    model = decoder_graph(decoder, "--sites")
    content: dict[str, Any]
    try:
        content, said = sites_content(find_residual_stream(model)), "complete"
    except (SiteNotFoundError, UnsupportedError) as error:
        content = sites_skeleton(model, str(error))
        said = f"to be completed by hand from {len(content['candidates'])} candidates"
    with staged_file(output, overwrite=overwrite) as staged:
        write_sites(content, staged)
    return Inspection(
        {**found.content, "sites_file": str(output)}, f"{found.text}\nsites -> {output}, {said}"
    )


def decoder_graph(path: Path, option: str) -> ModelProto:
    """The graph of an ONNX file. Raises `InputError` for anything else."""
    if path.suffix != ".onnx":
        raise InputError(f"{option} needs an ONNX decoder (.onnx); {path} is none")
    return read_graph(path)
