"""Vectors of IBM's activation-steering (`.svec`): JSON with `model_type`, `directions`, `explained_variances`.

That library wraps every decoder block and adds, before the block runs, `strength · directions[i]` to what block i,
counted from 0, reads: at every position of every pass, in the first row of a batch. Strength and layers are arguments
of its `steer`, not of the file; so are conditions, thresholds and the rescaling to the norm before.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError, UnsupportedError
from calibration.plan import Site
from sarsteer_export.interchange.fitting import Fitted, Holding
from sarsteer_export.interchange.vectors import LayerVectors, as_float32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HOLDING = Holding("an .svec file", "activation-steering", Site.BLOCK_INPUT)
SUFFIX = ".svec"
UNKNOWN_MODEL = "unknown"
KEYS = ("model_type", "directions", "explained_variances")
LAYER = re.compile(r"0|-?[1-9][0-9]{0,8}")


def read_svec(content: bytes, name: str) -> LayerVectors:
    """The vectors of an `.svec` file called `name`.

    Raises `UnsupportedError` when its name says that it is a condition vector: nothing in the file tells the two
    kinds apart. Raises `InputError` for other JSON.
    """
    if "condition" in name.lower():
        raise UnsupportedError(
            "its name says that it is a condition vector: such a vector is compared with the stream and decides "
            "whether others act, it is never added, and plans have no conditions; if it is a behavior vector, "
            "rename the file"
        )
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"it is not JSON ({reason})") from None
    directions = data.get("directions") if isinstance(data, dict) else None
    if not isinstance(directions, dict) or "model_type" not in data:
        raise InputError(f"it is no .svec file; expected a JSON object with {', '.join(KEYS)}")
    by_layer: dict[int, NDArray[np.float32]] = {}
    for key, values in directions.items():
        if LAYER.fullmatch(key) is None:
            raise InputError(f"directions has the key {key!r}; expected the number of a layer")
        by_layer[int(key)] = as_float32(f"directions.{key}", values)
    notes = (
        f"all {len(by_layer)} layers of the file are steered, with one strength; activation-steering is told both when "
        "it steers (its default is layers 10 to 15): say them with --layers and --strength",
        "a condition vector looks the same as a behavior vector; only the latter is meant to be added",
    )
    return LayerVectors(
        "activation-steering .svec",
        Site.BLOCK_INPUT,
        by_layer,
        {"model_type": str(data["model_type"])},
        notes,
    )


def svec_bytes(fitted: Fitted, *, model_type: str | None) -> bytes:
    """An `.svec` file of the vectors. Its explained variances, which no addition has, are empty."""
    data: dict[str, Any] = {
        "model_type": model_type or UNKNOWN_MODEL,
        "directions": {str(layer): vector_D.tolist() for layer, vector_D in fitted.by_layer.items()},
        "explained_variances": {},
    }
    return json.dumps(data, allow_nan=False).encode("utf-8")
