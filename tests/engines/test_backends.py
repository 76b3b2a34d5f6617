"""The table of backends, and how a library that cannot be loaded is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.errors import UnsupportedError
from engines.backends import BACKENDS, CPU_BACKEND, Backend, Runtime, find_backend


def test_the_names_are_the_values_of_engine() -> None:
    assert list(BACKENDS) == [
        "onnxruntime-cpu",
        "onnxruntime-cuda",
        "onnxruntime-tensorrt",
        "tensorrt",
        "tensorrt-rtx",
    ]
    assert all(find_backend(name).name == name for name in BACKENDS)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"no engine 'tensor'.*onnxruntime-cpu.*tensorrt-rtx"):
        find_backend("tensor")


def test_only_the_cpu_runs_without_a_gpu_and_only_enterprise_tensorrt_cannot_build() -> None:
    assert [name for name, row in BACKENDS.items() if row.runs_without_gpu] == [CPU_BACKEND.name]
    assert [name for name, row in BACKENDS.items() if not row.builds_without_gpu] == ["tensorrt"]


@pytest.mark.parametrize("row", BACKENDS.values(), ids=lambda row: row.name)
def test_an_onnx_runtime_row_has_a_provider_and_a_tensorrt_row_none(row: Backend) -> None:
    assert (row.provider is not None) == (row.runtime is Runtime.ONNX_RUNTIME)


def test_a_library_that_is_here_is_loaded_and_tells_its_version() -> None:
    import onnxruntime

    assert CPU_BACKEND.load() is onnxruntime
    assert CPU_BACKEND.version() == onnxruntime.__version__


Plant = Callable[[str], Backend]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A backend whose module is the given source."""

    def plant(source: str) -> Backend:
        (tmp_path / "planted_runtime.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "planted_runtime", raising=False)
        return Backend("planted", Runtime.TENSORRT, "planted_runtime", "planted-package")

    return plant


def test_a_library_that_is_not_installed_is_named_with_its_package() -> None:
    missing = Backend("planted", Runtime.TENSORRT, "no_such_runtime", "planted-package")
    with pytest.raises(UnsupportedError) as caught:
        missing.load()
    assert caught.value.exit_code == 3
    for words in (
        "--engine planted",
        "No module named 'no_such_runtime'",
        "pip install planted-package",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["ImportError", "OSError", "RuntimeError"])
def test_a_library_that_breaks_while_it_is_imported_is_said(plant: Plant, kind: str) -> None:
    backend = plant(f"raise {kind}('libnvinfer.so.11 is not here')")
    with pytest.raises(
        UnsupportedError, match=r"libnvinfer\.so\.11 is not here.*pip install planted-package"
    ):
        backend.load()


def test_float32_means_float32_on_cuda() -> None:
    """The provider's default is TF32, with a mantissa of 10 bits."""
    assert ("use_tf32", "0") in BACKENDS["onnxruntime-cuda"].provider_options
