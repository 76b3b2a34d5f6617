"""What every use of the TensorRT API here shares: its log, its dtypes, names of its enums.

`trt` is the module `tensorrt` or `tensorrt_rtx`, as a row of `engines.backends` loads it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from calibration.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

    from engines.backends import Backend

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's names of element types, and numpy's."""


def dtype_name(trt_dtype: Any) -> str:
    """The numpy name of a TensorRT dtype. Raises `UnsupportedError` for one that numpy has no name for."""
    name = enum_name(trt_dtype)
    if name not in DTYPES:
        raise UnsupportedError(f"a tensor of the engine is {name}, which cannot be fed from here")
    return DTYPES[name]


def enum_name(value: Any) -> str:
    """The bare name of an enum value of the bindings, such as `ELEMENTWISE`."""
    return str(value).rpartition(".")[2]


@cache
def log_of(backend: Backend) -> Any:
    """The log of a backend: TensorRT keeps the first logger it is given for the life of the process."""
    return _make_log(backend.load())


def _make_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the lines of the work under way; a worker thread may write while another reads."""

        def __init__(self) -> None:
            super().__init__()
            self._lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT for every line; what is not worth keeping is dropped here."""
            kind = enum_name(severity)
            if kind in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                self._lines.append((kind, " ".join(message.split())))

        def start(self) -> None:
            """Forget the lines of earlier work."""
            self._lines.clear()

        @property
        def errors(self) -> list[str]:
            """Error lines since the start, each once."""
            return list(dict.fromkeys(line for kind, line in self._lines if kind != "WARNING"))

        @property
        def warnings(self) -> list[str]:
            """Warning lines since the start, each once."""
            return list(dict.fromkeys(line for kind, line in self._lines if kind == "WARNING"))

    return Log()
