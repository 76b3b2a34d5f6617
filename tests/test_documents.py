"""What the documents tell a person to type is what the program takes."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import sarsteer_export
from sarsteer_export.cli import COMMANDS, LazyGroup, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "docs/adapters.md",
    "docs/audit.md",
    "docs/bundle.md",
    "docs/calibration.md",
    "docs/data.md",
    "docs/decoders.md",
    "docs/engines.md",
    "docs/evaluate.md",
    "docs/gpu.md",
    "docs/inspect.md",
    "docs/interchange.md",
    "docs/models.md",
    "docs/parity.md",
    "docs/plan.md",
    "docs/results.md",
    "docs/sweep.md",
    "examples/pocket_lalm/README.md",
]


def commands_in(text: str) -> list[list[str]]:
    """Every `sarsteer-export …` line of the shell blocks of a document, split as a shell would."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.partition("sarsteer-export ")[2] for line in lines if "sarsteer-export " in line]
    return [shlex.split(line, comments=True) for line in found]


def parse(arguments: list[str]) -> click.Context:
    group = main
    assert isinstance(group, LazyGroup)
    name, *rest = arguments
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"{name} is no command"
    return command.make_context(name, rest, parent=click.Context(main, help_option_names=["-h", "--help"]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_parses(document: str) -> None:
    for arguments in commands_in((ROOT / document).read_text(encoding="utf-8")):
        parse(arguments)


def test_the_readme_shows_commands_and_a_wrong_one_would_be_noticed() -> None:
    commands = commands_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"build", "run"} <= {arguments[0] for arguments in commands}
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["run", "bundle", "--text", "hello", "--frobnicate"])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_every_help_text_parses(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.help is not None
    (examples,) = re.findall(r"Examples?:\n(.*)", command.help, flags=re.DOTALL)
    for example in examples.replace("\\\n", " ").strip().splitlines():
        arguments = shlex.split(example)
        assert arguments[:2] == ["sarsteer-export", name]
        parse(arguments[1:])


def test_the_readme_names_every_command_and_links_to_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert re.search(rf"`{name}[ `]", readme) or f"sarsteer-export {name}" in readme
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_python_of_the_readme_compiles_and_imports_only_public_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
        for names in (node.names for node in imports if node.module == "sarsteer_export"):
            assert {name.name for name in names} <= set(sarsteer_export.__all__)
