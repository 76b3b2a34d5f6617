"""Trace a component with transformers' own ONNX exporter, and write the graph with its weights beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from calibration.errors import UnsupportedError
from graph_passes.plan_names import FINGERPRINT_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn

OPSET = 20
STACK_TRACE_KEY = "pkg.torch.onnx.stack_trace"
"""Node metadata with source paths of the exporting machine: half of a graph's size, of use to nobody."""


def trace(component: nn.Module, inputs: Mapping[str, Any]) -> ir.Model:
    """The graph of a component. Raises `UnsupportedError` with the reason when it cannot be traced."""
    with quiet(), torch.no_grad():
        try:
            make_exporter: Any = OnnxExporter
            config = OnnxConfig(dynamic=True, opset_version=OPSET)
            exported = make_exporter().export(component.eval(), dict(inputs), config)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            torch.onnx.errors.OnnxExporterError,
        ) as error:
            raise UnsupportedError(
                f"{type(component).__name__}: cannot be exported to ONNX ({_reason(error)})"
            ) from error
    program: ir.Model = exported.program
    if (lost := define_constants(program)) is not None:
        raise UnsupportedError(
            f"{type(component).__name__}: its exported graph reads {lost!r}, which nothing defines"
        )
    return program


def define_constants(model: ir.Model) -> str | None:
    """Make initializers of constants that are read and that nothing defines; the first other such tensor, or None.

    onnxscript 0.7 fuses nested clamps, and leaves constants that it makes of their limits out of the graph.
    """
    initializers = model.graph.initializers
    known = {*model.graph.inputs, *initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is None or value in known:
                continue
            if value.const_value is None or value.producer() is not None or value.name in initializers:
                return str(value.name)
            model.graph.register_initializer(value)
            known.add(value)
        known.update(node.outputs)
    return None


def write(model: ir.Model, path: Path, fingerprint: str | None) -> None:
    """Write a graph and its weights; `fingerprint`, when given, ties it to a checkpoint."""
    if fingerprint is not None:
        model.metadata_props[FINGERPRINT_KEY] = fingerprint
    for node in model.graph:
        node.metadata_props.pop(STACK_TRACE_KEY, None)
    data = path.with_name(f"{path.name}_data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=1024)
    for file in (path, data):
        if file.exists():
            file.chmod(0o644)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress prints, version notes and deprecation warnings out of our output."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(
                io.StringIO()
            ),  # where a trace fails, what was traced is printed there
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _reason(error: Exception) -> str:
    """The first line of the error at the root, which says what could not be traced."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
