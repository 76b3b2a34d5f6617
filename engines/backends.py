"""The backends an engine can be built for and run on: one table, one row per value of `--engine`.

TensorRT and TensorRT-RTX share one API and one code path (`engines/trt`); what differs between them is their row
here. ONNX Runtime's execution providers run the ONNX file itself, so that nothing is built for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibration.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType


class Runtime(str, Enum):
    """The library that a backend belongs to."""

    ONNX_RUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class Backend:
    """One backend.

    `module` is what Python imports, `package` what pip installs for it. `provider` and `provider_options` are
    ONNX Runtime's. `builds_without_gpu` and `runs_without_gpu` say what a machine without an NVIDIA driver can
    do. `targets`: CUDA compute capabilities that an engine serves unless told otherwise; none stands for the
    GPU of the machine that builds.
    """

    name: str
    runtime: Runtime
    module: str
    package: str
    provider: str | None = None
    provider_options: tuple[tuple[str, str], ...] = ()
    builds_without_gpu: bool = False
    runs_without_gpu: bool = False
    targets: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        """Import the library. Raises `UnsupportedError`, with the remedy, when that fails."""
        try:
            return import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:  # the last two: shared libraries are missing
            raise UnsupportedError(
                f"--engine {self.name} needs the Python module {self.module!r}, which cannot be imported here "
                f"({error}); install it with: pip install {self.package}"
            ) from error

    def version(self) -> str:
        """The library's version."""
        library: Any = self.load()
        return str(library.__version__)


_ROWS = (
    Backend(
        name="onnxruntime-cpu",
        runtime=Runtime.ONNX_RUNTIME,
        module="onnxruntime",
        package="onnxruntime-gpu",
        provider="CPUExecutionProvider",
        builds_without_gpu=True,
        runs_without_gpu=True,
    ),
    Backend(
        name="onnxruntime-cuda",
        runtime=Runtime.ONNX_RUNTIME,
        module="onnxruntime",
        package="onnxruntime-gpu",
        provider="CUDAExecutionProvider",
        provider_options=(("use_tf32", "0"),),  # products in float32 are computed in float32
        builds_without_gpu=True,
    ),
    Backend(
        name="onnxruntime-tensorrt",
        runtime=Runtime.ONNX_RUNTIME,
        module="onnxruntime",
        package="onnxruntime-gpu",
        provider="TensorrtExecutionProvider",
        builds_without_gpu=True,
    ),
    Backend(
        name="tensorrt",
        runtime=Runtime.TENSORRT,
        module="tensorrt",
        package="tensorrt",
    ),
    Backend(
        name="tensorrt-rtx",
        runtime=Runtime.TENSORRT,
        module="tensorrt_rtx",
        package="tensorrt-rtx",
        builds_without_gpu=True,
        targets=("8.0", "8.6", "8.9", "12.0"),
    ),
)
BACKENDS: dict[str, Backend] = {row.name: row for row in _ROWS}
CPU_BACKEND = BACKENDS["onnxruntime-cpu"]
"""What every machine can run."""


def find_backend(name: str) -> Backend:
    """The backend of a name. Raises `UnsupportedError` for one that there is not."""
    if name not in BACKENDS:
        raise UnsupportedError(f"there is no engine {name!r}; expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
