"""What the driver says, read from a driver made of Python functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from engines import cuda_driver as module
from engines.cuda_driver import (
    LIBRARIES,
    MAJOR_ATTRIBUTE,
    MANAGEMENT_LIBRARIES,
    NO_DRIVER,
    NO_GPU,
    CudaDriver,
    Gpu,
    cuda_driver,
)

GPUS = (Gpu("NVIDIA RTX 4090", "8.9", 24 << 30), Gpu("NVIDIA RTX 5090", "12.0", 32 << 30))


class Driver:
    """The driver's and the management library's functions, filling what they are pointed to as C does."""

    def __init__(self, gpus: tuple[Gpu, ...] = GPUS, version: int = 13010, **statuses: int) -> None:
        self.gpus, self.version, self.statuses = gpus, version, statuses

    def status(self, function: str) -> int:
        return self.statuses.get(function, 0)

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.status("cuInit")

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return self.status("cuDriverGetVersion")

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = f"meaning of {status}".encode()
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return self.status("cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = 40 + number  # a handle is not the number
        return self.status("cuDeviceGet")

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert size == len(name)
        name.value = self.gpus[device.value - 40].name.encode()
        return self.status("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        major, minor = self.gpus[device.value - 40].compute_capability.split(".")
        value._obj.value = int(major if attribute == MAJOR_ATTRIBUTE else minor)
        return self.status("cuDeviceGetAttribute")

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:  # noqa: N802
        memory._obj.value = self.gpus[device.value - 40].memory_bytes
        return self.status("cuDeviceTotalMem_v2")

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.status("nvmlInit_v2")

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        assert size == len(text)
        text.value = b"580.95.05"
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make the loader find these libraries, by name, and no others."""

    def install(**libraries: Any) -> None:
        found = {"driver": LIBRARIES[0], "management": MANAGEMENT_LIBRARIES[0]}
        known = {found[kind]: library for kind, library in libraries.items()}

        def load(name: str) -> Any:
            if name not in known:
                raise OSError(f"{name}: cannot open shared object file")
            return known[name]

        monkeypatch.setattr(module.ctypes, "CDLL", load)

    return install


def test_a_driver_tells_its_gpus_and_versions(install: Install) -> None:
    driver = Driver()
    install(driver=driver, management=driver)
    assert cuda_driver() == CudaDriver("13.1", GPUS, None, "580.95.05")


@pytest.mark.parametrize(("number", "shown"), [(12080, "12.8"), (13000, "13.0"), (11040, "11.4"), (0, None)])
def test_a_cuda_version_is_a_thousand_times_its_major_and_ten_times_its_minor(
    install: Install, number: int, shown: str | None
) -> None:
    install(driver=Driver(version=number))
    assert cuda_driver().cuda_version == shown


def test_no_driver_is_said(install: Install) -> None:
    install()
    assert cuda_driver() == CudaDriver(None, (), NO_DRIVER)


def test_a_driver_that_does_not_start_is_said_with_its_own_words(install: Install) -> None:
    install(driver=Driver(cuInit=803))
    found = cuda_driver()
    assert found.problem == "the NVIDIA driver cannot be used (cuInit returned error 803: meaning of 803)"
    assert (found.cuda_version, found.gpus) == ("13.1", ())


@pytest.mark.parametrize("driver", [Driver(cuInit=100), Driver(gpus=())])
def test_a_driver_without_a_gpu_is_said(install: Install, driver: Driver) -> None:
    install(driver=driver)
    assert cuda_driver() == CudaDriver("13.1", (), NO_GPU)


@pytest.mark.parametrize(
    "function",
    ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDeviceTotalMem_v2"],
)
def test_a_function_that_fails_leaves_no_half_read_gpu(install: Install, function: str) -> None:
    install(driver=Driver(**{function: 999}))
    found = cuda_driver()
    assert found.gpus == ()
    assert f"{function} returned error 999" in str(found.problem)


def test_a_library_that_is_no_driver_is_said(install: Install) -> None:
    install(driver=object())
    found = cuda_driver()
    assert found == CudaDriver(None, (), "the NVIDIA driver cannot be used (it has no function cuInit)")


@pytest.mark.parametrize("management", [Driver(nvmlInit_v2=1), object()])
def test_a_release_that_cannot_be_read_hides_nothing_else(install: Install, management: object) -> None:
    install(driver=Driver(), management=management)
    assert cuda_driver() == CudaDriver("13.1", GPUS, None, None)


@pytest.mark.gpu
def test_the_driver_of_this_machine_agrees_with_torch() -> None:
    torch: Any = pytest.importorskip("torch")
    found = cuda_driver()
    if found.problem is not None:
        pytest.skip(found.problem)
    first = torch.cuda.get_device_properties(0)
    assert found.gpus[0].name == first.name
    assert found.gpus[0].compute_capability == f"{first.major}.{first.minor}"
