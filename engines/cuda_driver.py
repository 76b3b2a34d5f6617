"""What the NVIDIA driver of this machine says of itself and its GPUs, asked directly: no toolkit, no PyTorch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
MANAGEMENT_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE: the driver works and sees no GPU."""
NO_DRIVER = "no NVIDIA driver is installed"
NO_GPU = "the NVIDIA driver sees no GPU"
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, CUDA compute capability (such as `8.9`) and memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class CudaDriver:
    """The driver: the newest CUDA version it serves (such as `13.0`) and the GPUs it sees.

    `problem` says why there is nothing to be seen, and is None when at least one GPU can be used. `release` is
    the driver's own number (such as `580.95.05`).
    """

    cuda_version: str | None
    gpus: tuple[Gpu, ...]
    problem: str | None
    release: str | None = None


def cuda_driver() -> CudaDriver:
    """Ask the driver. Never raises: what is missing is said in `problem`."""
    library = _load(LIBRARIES)
    if library is None:
        return CudaDriver(None, (), NO_DRIVER)
    version, release = _cuda_version(library), _release()
    try:
        gpus = _gpus(library)
    except _CallError as error:
        if error.status == NO_DEVICE:
            return CudaDriver(version, (), NO_GPU, release)
        return CudaDriver(version, (), f"the NVIDIA driver cannot be used ({error})", release)
    return CudaDriver(version, gpus, None if gpus else NO_GPU, release)


class _CallError(Exception):
    """A function of the driver is missing, or failed with a status."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def _load(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _call(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    try:
        status = getattr(library, function)(*arguments)
    except AttributeError:
        raise _CallError(f"it has no function {function}", None) from None
    if status:
        raise _CallError(f"{function} returned error {status}{_meaning(library, status)}", status)


def _meaning(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    try:
        library.cuGetErrorString(status, ctypes.byref(text))
    except AttributeError:
        return ""
    return f": {text.value.decode(errors='replace')}" if text.value else ""


def _cuda_version(library: ctypes.CDLL) -> str | None:
    version = ctypes.c_int()
    try:
        _call(library, "cuDriverGetVersion", ctypes.byref(version))
    except _CallError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None


def _release() -> str | None:
    library = _load(MANAGEMENT_LIBRARIES)
    if library is None:
        return None
    text = ctypes.create_string_buffer(NAME_BYTES)
    try:
        _call(library, "nvmlInit_v2")
        _call(library, "nvmlSystemGetDriverVersion", text, NAME_BYTES)
        _call(library, "nvmlShutdown")
    except _CallError:
        return None
    return text.value.decode(errors="replace")


def _gpus(library: ctypes.CDLL) -> tuple[Gpu, ...]:
    count = ctypes.c_int()
    _call(library, "cuInit", 0)
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    return tuple(_gpu(library, number) for number in range(count.value))


def _gpu(library: ctypes.CDLL, number: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    _call(library, "cuDeviceGet", ctypes.byref(device), number)
    _call(library, "cuDeviceGetName", name, NAME_BYTES, device)
    _call(library, "cuDeviceGetAttribute", ctypes.byref(major), MAJOR_ATTRIBUTE, device)
    _call(library, "cuDeviceGetAttribute", ctypes.byref(minor), MINOR_ATTRIBUTE, device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)
