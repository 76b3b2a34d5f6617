"""An adapter that a user wrote: from `path/to/file.py:Class` or `package.module:Class`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import InputError
from calibration.model_adapter import ModelAdapter

if TYPE_CHECKING:
    from types import ModuleType

EXPECTED = "expected FILE.py:CLASS or PACKAGE.MODULE:CLASS"


def load_adapter(reference: str) -> type[ModelAdapter]:
    """Import the adapter class that a reference names; this runs the module's code.

    Raises `InputError` when there is no such module or class, or when the class is no `ModelAdapter`.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise InputError(f"adapter {reference!r} names no class; {EXPECTED}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    adapter = getattr(module, name, None)
    if adapter is None:
        classes = [entry for entry, value in vars(module).items() if _is_adapter(value)]
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)
        hint = (
            f"; did you mean {near[0]}?" if near else "; it holds no subclass of sarsteer_export.ModelAdapter"
        )
        raise InputError(f"adapter {place}: has no class {name}{hint}")
    if not _is_adapter(adapter):
        raise InputError(f"adapter {reference}: is no subclass of sarsteer_export.ModelAdapter")
    found: type[ModelAdapter] = adapter
    return found


def adapter_digest(adapter: type[ModelAdapter]) -> str:
    """Hex sha256 of the file that an adapter class is written in, as it was when it was imported."""
    source = inspect.getsourcefile(adapter)
    if source is None:
        raise InputError(f"adapter {adapter.__qualname__}: its source file is not known; write it in a file")
    return getattr(sys.modules[adapter.__module__], "__sha256__", None) or _sha256(Path(source))


def _from_file(path: Path) -> ModuleType:
    try:
        digest = _sha256(path)
    except OSError as error:
        raise InputError(f"adapter {path}: cannot be read ({error.strerror})") from error
    place = hashlib.sha256(f"{path.resolve()}\0{digest}".encode()).hexdigest()
    name = f"sarsteer_adapter_{place[:16]}"
    if name in sys.modules:  # the same file again is the same class
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # noqa: S101 - a path that ends in .py always has a loader
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__sha256__"] = digest
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"adapter {path}: cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"adapter {name}: cannot be imported ({type(error).__name__}: {error}); {EXPECTED}"
        ) from error


def _is_adapter(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ModelAdapter) and value is not ModelAdapter


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
