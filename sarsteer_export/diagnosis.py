"""What `doctor` found: rows for machines, a table for people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engines.cuda_driver import CudaDriver

GIB = 2**30
STEPS = {"builds": "build", "runs": "run", "refit": "refit"}
"""The columns of the engines, and what each is called in a list."""


class Answer(str, Enum):
    """Whether something works here; `UNKNOWN` where nothing forbids it and nobody promises it."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Obstacle:
    """Why something does not work here, and what to do about it, a line each."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Ability:
    """Whether one thing works, and everything that stands against it."""

    answer: Answer
    obstacles: tuple[Obstacle, ...]


@dataclass(frozen=True)
class EngineRow:
    """One value of `--engine`: whether its engines can be built, run, and have their steering swapped, here."""

    name: str
    builds: Ability
    runs: Ability
    refit: Ability


@dataclass(frozen=True)
class PackageRow:
    """A package: its version, or None where it is not installed, and what is to be known of it."""

    name: str
    version: str | None
    note: str


@dataclass(frozen=True)
class ProviderRow:
    """An execution provider of ONNX Runtime: `problem` says why a graph of one node does not run on it."""

    name: str
    compiled_in: bool
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What this machine can do. `problems` are those that no single engine stands for."""

    platform: str
    packages: tuple[PackageRow, ...]
    driver: CudaDriver
    providers: tuple[ProviderRow, ...]
    engines: tuple[EngineRow, ...]
    problems: tuple[Obstacle, ...]

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The diagnosis as text: a section per topic, columns aligned."""
        sections = (
            ("packages", _columns((row.name, row.version or "-", row.note) for row in self.packages)),
            ("driver and GPUs", _driver_lines(self.driver)),
            ("ONNX Runtime providers", _columns((row.name, _provider_text(row)) for row in self.providers)),
            ("engines", self._engine_lines()),
            ("what to do", self._remedy_lines()),
        )
        blocks = ("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines)
        return "\n\n".join((self.platform, *blocks))

    def _engine_lines(self) -> list[str]:
        rows = ((row.name, *(getattr(row, step).answer.value for step in STEPS)) for row in self.engines)
        return _columns([("--engine", *STEPS), *rows])

    def _remedy_lines(self) -> list[str]:
        """Every obstacle once, with its remedy and what it stops."""
        stopped: dict[Obstacle, list[str]] = {problem: [] for problem in self.problems}
        for row in self.engines:
            steps: dict[Obstacle, list[str]] = {}
            for column, step in STEPS.items():
                for obstacle in getattr(row, column).obstacles:
                    steps.setdefault(obstacle, []).append(step)
            for obstacle, names in steps.items():
                stopped.setdefault(obstacle, []).append(f"{row.name} ({', '.join(names)})")
        lines = []
        for obstacle, engines in stopped.items():
            lines += [obstacle.reason, f"  remedy: {obstacle.remedy}"]
            if engines:
                lines.append(f"  concerns: {', '.join(engines)}")
        return lines


def _driver_lines(driver: CudaDriver) -> list[str]:
    served = [f"driver {driver.release}"] if driver.release else []
    served += [f"CUDA up to {driver.cuda_version}"] if driver.cuda_version else []
    gpus = (
        (f"GPU {number}", gpu.name, f"compute capability {gpu.compute_capability}", _gib(gpu.memory_bytes))
        for number, gpu in enumerate(driver.gpus)
    )
    return [*filter(None, (", ".join(served), driver.problem)), *_columns(gpus)]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


def _provider_text(row: ProviderRow) -> str:
    if row.problem is None:
        return "runs"
    return f"compiled in, does not run: {row.problem}" if row.compiled_in else f"no: {row.problem}"


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column but the last as wide as its widest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
