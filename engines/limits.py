"""How far an engine may be from eager PyTorch: a table by backend and precision; each row says why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from calibration.errors import UnsupportedError


@dataclass(frozen=True)
class Limits:
    """Limits of one backend and precision.

    `max_abs` bounds |engine − oracle| relative to the oracle's largest magnitude in the same output;
    `cosine`, `effect_cosine` are least values; `kl` is nats, the most over rows; `top1` the least share of
    rows whose best token agrees, ties aside; `effect_ratio` the most the norm ratio may differ from 1;
    `effect_floor` the least effect, relative to the tensor it acts on, that stands out of rounding.
    """

    max_abs: float
    cosine: float
    kl: float
    top1: float
    effect_cosine: float
    effect_ratio: float
    effect_floor: float
    source: str


LIMITS: dict[tuple[str, str], Limits] = {
    ("onnxruntime-cpu", "float32"): Limits(
        max_abs=1e-4,
        cosine=0.999999,
        kl=1e-6,
        top1=1.0,
        effect_cosine=0.9999,
        effect_ratio=1e-3,
        effect_floor=1e-5,
        source=(
            "Both sides are float32 and differ in the order of sums alone: 1e-6 relative was measured on "
            "the pocket LALM; 1e-4 leaves room for 32 blocks of width 4096"
        ),
    ),
    ("onnxruntime-cpu", "float16"): Limits(
        max_abs=1e-2,
        cosine=0.9999,
        kl=5e-3,
        top1=1.0,
        effect_cosine=0.999,
        effect_ratio=2e-2,
        effect_floor=1e-2,
        source=(
            "Both sides are float16, but the CPU provider computes in float32 and rounds at other places "
            "than PyTorch does: 2e-3 relative and 4e-3 in the effect's norm were measured on the pocket LALM"
        ),
    ),
}

_NOT_MEASURED = "Provisional: no GPU has run it for this project yet. "
_ON_GPU = {
    "float32": dataclasses.replace(
        LIMITS["onnxruntime-cpu", "float32"],
        source=_NOT_MEASURED
        + "Both sides compute in float32 (TF32 is switched off), as on ONNX Runtime's CPU provider",
    ),
    "float16": dataclasses.replace(
        LIMITS["onnxruntime-cpu", "float16"],
        source=_NOT_MEASURED
        + "Both sides round to 11 bits at every tensor, as on ONNX Runtime's CPU provider",
    ),
    "bfloat16": Limits(
        max_abs=5e-2,
        cosine=0.998,
        kl=1e-2,
        top1=1.0,
        effect_cosine=0.999,
        effect_ratio=2e-2,
        effect_floor=5e-2,
        source=(
            _NOT_MEASURED
            + "About three times the distance between eager bfloat16 and the same weights computed in "
            "float32, on the pocket LALM: 1.5e-2 relative, cosine 0.9994, KL 2.6e-3, effect norm ratio 6e-3"
        ),
    ),
}
LIMITS |= {
    (backend, precision): limits
    for backend in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx")
    for precision, limits in _ON_GPU.items()
    if precision != "bfloat16"
    or not backend.startswith("onnxruntime")  # whose Python interface has no bfloat16
}


def limits_for(backend: str, precision: str) -> Limits:
    """The limits of a backend and precision. Raises `UnsupportedError` for a pair that has none."""
    limits = LIMITS.get((backend, precision))
    if limits is None:
        known = ", ".join(f"{backend}/{precision}" for backend, precision in LIMITS)
        raise UnsupportedError(f"no parity limits for {backend}/{precision}; there are limits for {known}")
    return limits
