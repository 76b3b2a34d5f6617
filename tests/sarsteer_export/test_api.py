"""The public API: what `sarsteer_export` names, whatever was imported before."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest

import sarsteer_export
from tests.sarsteer_export.command_line import run_python

SUBMODULES = (
    "sarsteer_export.exporting.export",
    "sarsteer_export.verification",
    "sarsteer_export.pipeline",
    "sarsteer_export.patching",
    "sarsteer_export.bundle.bundle",
    "sarsteer_export.cli.build",
    "sarsteer_export.cli.calibrate",
    "sarsteer_export.cli.export",
    "sarsteer_export.cli.patch",
    "sarsteer_export.cli.verify",
    "calibration.calibrate",
    "calibration.steered",
)


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for name in sarsteer_export.__all__:
        thing = getattr(sarsteer_export, name)
        assert callable(thing), f"{name} is {thing!r}, a module?"
        doc = inspect.getdoc(thing)
        assert doc, name
        assert len(doc.split()) >= 4, f"{name}: {doc}"
        assert not doc.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"


def test_what_type_checkers_see_is_what_is_exported() -> None:
    source = ast.parse(Path(str(sarsteer_export.__file__)).read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "importlib", "typing")
        for alias in node.names
    }
    assert sorted(imported) == sorted(sarsteer_export.__all__)
    for name, module in imported.items():
        assert getattr(sarsteer_export, name) is getattr(importlib.import_module(str(module)), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = sarsteer_export.distill


@pytest.mark.parametrize("order", ["submodules first", "names first"])
def test_submodules_never_shadow_the_names(order: str) -> None:
    code = f"""
import importlib, json, sys
import sarsteer_export
if {order!r} == "names first":
    early = {{name: getattr(sarsteer_export, name) for name in sarsteer_export.__all__}}
for module in {SUBMODULES!r}:
    importlib.import_module(module)
import sarsteer_export.exporting.export
kinds = {{name: type(getattr(sarsteer_export, name)).__name__ for name in sarsteer_export.__all__}}
print(json.dumps(kinds))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout)
    assert sorted(kinds) == sorted(sarsteer_export.__all__)
    assert "module" not in kinds.values()
    for name in ("build", "calibrate", "export", "load_bundle", "patch", "steered", "verify"):
        assert kinds[name] == "function"


def test_importing_the_package_imports_no_library_that_does_the_work() -> None:
    code = "import sys, sarsteer_export; print([n for n in ('torch', 'numpy', 'onnx') if n in sys.modules])"
    assert run_python(code).stdout == "[]\n"


def test_loading_a_bundle_imports_neither_torch_nor_onnx(bundle_path: Path) -> None:
    code = (
        "import sys; from sarsteer_export import load_bundle\n"
        "with load_bundle(sys.argv[1]) as bundle: bundle.generate(None, 'hello', max_new_tokens=2)\n"
        "print([n for n in ('torch', 'onnx', 'onnxscript') if n in sys.modules])"
    )
    done = run_python(code, bundle_path)
    assert done.stdout == "[]\n", done.stderr
