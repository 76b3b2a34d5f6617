"""Control vectors of llama.cpp (GGUF), as its loader and its `cvector-generator` and repeng's `export_gguf` have them.

A tensor `direction.N` (D,) float32 is added, in every pass and at every position, to what block N, counted from 0,
returns: `build_cvec` comes after the last residual add of block `il` and takes tensor `il`. For block 0 there is
never a tensor; llama.cpp refuses a file that has a `direction.0`. Blocks without a tensor are left alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.plan import Site
from sarsteer_export.interchange.fitting import Fitted, Holding
from sarsteer_export.interchange.gguf import gguf_bytes, read_gguf
from sarsteer_export.interchange.vectors import LayerVectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,8})")
HOLDING = Holding("a control vector (GGUF)", "llama.cpp", Site.BLOCK_OUTPUT, first=1)
UNKNOWN_MODEL = "unknown"


def read_control_vector(content: bytes) -> LayerVectors:
    """The vectors of a GGUF file. Raises `InputError` for another GGUF file, such as a model."""
    file = read_gguf(content)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(
            f"general.architecture is {architecture!r}; expected {ARCHITECTURE!r}: is this a model's GGUF file?"
        )
    by_layer: dict[int, NDArray[np.float32]] = {}
    for name, tensor in file.tensors.items():
        match = DIRECTION.fullmatch(name)
        if match is None:
            raise InputError(
                f"tensor {name!r} is no direction; expected direction.N alone, which llama.cpp takes"
            )
        if any(size != 1 for size in tensor.shape[:-1]):
            raise InputError(f"tensor {name!r} has shape {tensor.shape}; expected one dimension")
        by_layer[int(match[1])] = tensor.reshape(-1)
    notes = (
        ("direction.0 is read as repeng applies it, behind block 0; llama.cpp refuses this file",)
        if 0 in by_layer
        else ()
    )
    hint = file.metadata.get("controlvector.model_hint")
    details = {} if hint is None else {"model_hint": str(hint)}
    return LayerVectors("llama.cpp control vector", Site.BLOCK_OUTPUT, by_layer, details, notes)


def control_vector_bytes(fitted: Fitted, *, model_type: str | None, plan_sha256: str) -> bytes:
    """A GGUF file of the vectors; `layer_count` is their number, as the generators of llama.cpp and repeng write it."""
    metadata: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        "controlvector.model_hint": model_type or UNKNOWN_MODEL,
        "controlvector.layer_count": len(fitted.by_layer),
        "sarsteer.plan_sha256": plan_sha256,
    }
    return gguf_bytes(
        metadata, {f"direction.{layer}": vector_D for layer, vector_D in fitted.by_layer.items()}
    )
