"""Measured settings, and the hidden folder beside the output that keeps them while a sweep is unfinished."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import InputError
from calibration.statistics import StateStatistics
from sarsteer_export.evaluation.written import finite
from sarsteer_export.staging import SWEEP_JSON, SWEEP_STATISTICS
from sarsteer_export.sweeping.grid import Line
from sarsteer_export.sweeping.lock import LOCK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sarsteer_export.evaluation.intervals import Estimate

INPUTS, POINTS = "inputs.json", "points.jsonl"


def unfinished_folder(output: Path) -> Path:
    """Where what a sweep has found stays until it is whole."""
    return output.with_name(f".{output.name}.unfinished")


@dataclass(frozen=True)
class Reading:
    """A figure with the interval that reports show, and how that was made."""

    value: float
    low: float
    high: float
    method: str

    @classmethod
    def of(cls, estimate: Estimate) -> Reading:
        """What is kept of an estimate."""
        shown = estimate.interval
        return cls(estimate.value, shown.low, shown.high, shown.method)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Reading:
        """The same from its fields; null, which stands for what is not finite, becomes NaN."""
        value, low, high = (
            math.nan if content[part] is None else float(content[part]) for part in ("value", "low", "high")
        )
        return cls(value, low, high, str(content["method"]))


Figures = dict[str, Reading]


@dataclass(frozen=True)
class Point:
    """One setting and its figures by name, those of `evaluation.figures`."""

    line: Line
    alpha: float
    figures: Figures

    @property
    def values(self) -> dict[str, float]:
        """The figures without their intervals."""
        return values_of(self.figures)

    def to_json(self) -> dict[str, Any]:
        """One line of the file of points; null stands for numbers that are not finite."""
        line = self.line
        setting = {
            "lambda": line.ablation,
            "rank": line.rank,
            "layers": None if line.layers is None else list(line.layers),
            "alpha": self.alpha,
        }
        figures: dict[str, Any] = finite({name: asdict(reading) for name, reading in self.figures.items()})
        return {**setting, "figures": figures}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Point:
        """The point of such a line. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        layers = content["layers"]
        line = Line(
            float(content["lambda"]),
            int(content["rank"]),
            None if layers is None else tuple(int(layer) for layer in layers),
        )
        figures = {str(name): Reading.from_json(reading) for name, reading in content["figures"].items()}
        return cls(line, float(content["alpha"]), figures)


def values_of(figures: Mapping[str, Reading]) -> dict[str, float]:
    """Figures without their intervals."""
    return {name: reading.value for name, reading in figures.items()}


class Unfinished:
    """What a sweep has found so far, in a folder of its own until the sweep is whole.

    `inputs`: all that a point depends on beside its setting, as JSON; points of other inputs are never gone on from.
    """

    def __init__(self, output: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = unfinished_folder(output)
        self._output = output
        self._inputs = json.loads(json.dumps(inputs))
        self.points: dict[tuple[Line, float], Point] = {}

    def begin(self, *, resume: bool = True) -> None:
        """Take up what is there, or else the points of the finished sweep at the output. The folder is there, `locked`.

        Without `resume`, throw it away. Raises `InputError` when what is taken up is of other inputs, and when what is
        there is damaged.
        """
        if not resume:
            self.remove()
        if not (self.folder / INPUTS).is_file():
            self.remove()
            finished = self._finished() if resume else None
            for point in finished or ():
                self.add(point)
            if finished is not None:
                shutil.copyfile(self._output / SWEEP_STATISTICS, self.folder / SWEEP_STATISTICS)
            _write_whole(self.folder / INPUTS, json.dumps(self._inputs, indent=2))
            return
        self._check_inputs()
        self.points = self._read_points()

    def add(self, point: Point) -> None:
        """Keep a point; it is on the disk when this returns."""
        with (self.folder / POINTS).open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(point.to_json(), allow_nan=False) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        self.points[point.line, point.alpha] = point

    def statistics(self) -> tuple[StateStatistics, dict[str, Any]] | None:
        """The statistics that earlier runs kept here."""
        file = self.folder / SWEEP_STATISTICS
        if not file.is_file():
            return None
        try:
            return StateStatistics.load(file)
        except InputError as error:
            raise InputError(f"{error}; start anew with --no-resume") from error

    def remove(self) -> None:
        """Remove all but the lock from the folder."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        self.points = {}

    def _check_inputs(self) -> None:
        try:
            found = json.loads((self.folder / INPUTS).read_text(encoding="utf-8"))
            other = self._unlike(found)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.folder / INPUTS}: is damaged ({error}); start anew with --no-resume"
            ) from error
        if other:
            raise InputError(
                f"{self.folder}: holds an unfinished sweep of other inputs ({', '.join(other)}); finish that one with "
                "its own command, name another output, or throw it away with --no-resume"
            )

    def _read_points(self) -> dict[tuple[Line, float], Point]:
        file = self.folder / POINTS
        if not file.is_file():
            return {}
        whole, newline, rest = file.read_bytes().rpartition(b"\n")
        if rest:  # a run was killed while it wrote this
            file.write_bytes(whole + newline)
        try:
            points = [Point.from_json(json.loads(line)) for line in whole.decode("utf-8").splitlines()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: is damaged ({error}); start anew with --no-resume") from error
        return {(point.line, point.alpha): point for point in points}

    def _finished(self) -> list[Point] | None:
        """The points of the sweep that the output holds. Raises `InputError` when it is of other inputs."""
        try:
            content = json.loads((self._output / SWEEP_JSON).read_text(encoding="utf-8"))
            other = self._unlike(content["inputs"])
            points = [Point.from_json(point) for point in content["points"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is no sweep, or a damaged one, and is replaced by a new one
        if other:
            raise InputError(
                f"{self._output}: holds a finished sweep of other inputs ({', '.join(other)}); name another output, or "
                "measure anew with --no-resume, which replaces it when the new one is whole"
            )
        return points if (self._output / SWEEP_STATISTICS).is_file() else None

    def _unlike(self, found: Mapping[str, Any]) -> list[str]:
        """The names of the inputs that are not the same."""
        return sorted(name for name in {*found, *self._inputs} if found.get(name) != self._inputs.get(name))


def _write_whole(file: Path, content: str) -> None:
    partial = file.with_name(f"{file.name}.writing")
    partial.write_text(content + "\n", encoding="utf-8")
    partial.replace(file)
