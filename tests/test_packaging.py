"""What a wheel holds, the four packages and their type markers and nothing else, and the extras it offers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {"calibration", "engines", "graph_passes", "sarsteer_export"}


def test_the_wheel_holds_the_packages_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "examples", "tests", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sarsteer_export-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "sarsteer-export = sarsteer_export.cli:main" in opened.read(entry_points).decode()
    modules = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in modules} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= modules
    shipped = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert shipped == {name for name in modules if name.endswith(".py")}
    texts = {f"sarsteer_export/judges/{name}.txt" for name in ("judge_prompt", "refusal_phrases")}
    assert texts == {name for name in modules if name.endswith(".txt")}


def test_every_extra_that_code_or_documents_name_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    sources += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {
        extra
        for path in sources
        for extra in re.findall(r"sarsteer-export\[([\w-]+)\]", path.read_text(encoding="utf-8"))
    }
    assert "voxtral" in named
    assert named <= set(project["optional-dependencies"])
