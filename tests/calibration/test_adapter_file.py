"""Adapters of a user's own, by file or by package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from calibration.adapter_file import adapter_digest, load_adapter
from calibration.errors import InputError
from calibration.lalm import load_lalm
from calibration.model_options import ModelOptions, driven_by

SOURCE = """
from sarsteer_export import ModelAdapter

class Mine(ModelAdapter):
    def prompts(self, texts, *, spoken):
        return [prompt + "!" for prompt in super().prompts(texts, spoken=spoken)]

class Other:
    pass
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_class_in_a_file_drives_the_model_and_its_file_is_recorded(source: Path, checkpoint: Path) -> None:
    options = ModelOptions(adapter=f"{source}:Mine")
    lalm = options.load(checkpoint)
    (prompt,) = lalm.adapter.prompts(["hello"], spoken=True)
    assert prompt == load_lalm(checkpoint).adapter.prompts(["hello"], spoken=True)[0] + "!"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert driven_by(lalm) == {"adapter": "Mine", "adapter_sha256": digest}
    assert options.identity(checkpoint) != ModelOptions().identity(checkpoint)


def test_what_is_recorded_is_what_was_run(source: Path) -> None:
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    adapter = load_adapter(f"{source}:Mine")
    source.write_text(SOURCE + "# later\n", encoding="utf-8")
    assert adapter_digest(adapter) == before
    assert adapter_digest(load_adapter(f"{source}:Mine")) != before


def test_a_class_in_a_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine/adapters.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = load_adapter("package_of_mine.adapters:Mine")
    assert adapter.__name__ == "Mine"
    assert adapter_digest(adapter) == hashlib.sha256(SOURCE.encode()).hexdigest()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{folder}/mine.py", "names no class; expected FILE.py:CLASS or PACKAGE.MODULE:CLASS"),
        ("{folder}/mine.py:", "names no class"),
        ("{folder}/none.py:Mine", "cannot be read (No such file or directory)"),
        ("{folder}/mine.py:Mien", "has no class Mien; did you mean Mine?"),
        ("{folder}/mine.py:Other", "is no subclass of sarsteer_export.ModelAdapter"),
        ("{folder}/mine.py:ModelAdapter", "is no subclass of"),
        ("no_such_package.adapters:Mine", "cannot be imported (ModuleNotFoundError"),
        ("{folder}/broken.py:Mine", "cannot be imported (SyntaxError"),
        ("{folder}/empty.py:Mine", "it holds no subclass of"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(reference: str, message: str, source: Path) -> None:
    (source.parent / "broken.py").write_text("class", encoding="utf-8")
    (source.parent / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        load_adapter(reference.format(folder=source.parent))
    assert message in str(refusal.value)
