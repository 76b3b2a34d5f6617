"""Where the nodes of a steered decoder spend their time, by ONNX Runtime's own profile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx

from random_decoder import Feeds, Settings, open_session, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PHASES = ("prefill", "decode")
NODE_SUFFIX = "_kernel_time"
WARM_UP_RUNS = 3
"""Runs before anything is counted: the first ones allocate."""


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of a sample."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray[Any, Any]) -> Spread:
        """The spread of some values."""
        lower, median, upper = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(lower), float(upper))

    def text(self, digits: int) -> str:
        """The median, and the quartiles in brackets."""
        return f"{self.median:.{digits}f} [{self.lower:.{digits}f}, {self.upper:.{digits}f}]"


@dataclass(frozen=True)
class NodeTime:
    """One phase: where the nodes of a steered pass spend their time, by the runtime's own profile.

    `total_us`, `steering_us`: microseconds of a pass in all nodes, and in those named `sarsteer.`. `share`:
    their ratio in each pass. `share_at_most`: the same with other nodes counted as steering that absorbed a
    steering node in the runtime's optimiser; they do other work as well.
    """

    total_us: Spread
    steering_us: Spread
    share: Spread
    share_at_most: Spread


def measure_node_time(
    steered: Path, feeds: Mapping[str, Feeds], settings: Settings, folder: Path
) -> tuple[dict[str, NodeTime], dict[str, int]]:
    """Profile the steered decoder: node time by phase, and what the optimiser made of the steering nodes."""
    optimised = folder / "optimised.onnx"
    session = open_session(
        steered,
        settings.threads,
        enable_profiling=True,
        profile_file_prefix=str(folder / "profile"),
        optimized_model_filepath=str(optimised),
    )
    counted = {phase: max(2, settings.pairs_of(phase) // 2) for phase in PHASES}
    for phase in PHASES:
        for _ in range(WARM_UP_RUNS + counted[phase]):
            run(session, feeds[phase])
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # The profiled graph is the optimised one; its nodes, not the file's, are what there is to count.
    before = onnx.load(steered, load_external_data=False).graph
    after = onnx.load(optimised, load_external_data=False).graph
    steering, absorbed = steering_nodes(before, after)
    runs = _by_run(events)
    if len(runs) != len(PHASES) * WARM_UP_RUNS + sum(counted.values()):
        raise click.ClickException(f"the runtime's profile holds {len(runs)} runs; some were lost")
    times = {}
    for phase in PHASES:
        kept = runs[WARM_UP_RUNS : WARM_UP_RUNS + counted[phase]]
        runs = runs[WARM_UP_RUNS + counted[phase] :]
        total = np.array([_microseconds(nodes) for nodes in kept])
        ours = np.array([_microseconds(nodes, steering) for nodes in kept])
        others = np.array([_microseconds(nodes, absorbed) for nodes in kept])
        times[phase] = NodeTime(
            Spread.of(total), Spread.of(ours), Spread.of(ours / total), Spread.of((ours + others) / total)
        )
    inserted = sum(node.name.startswith("sarsteer.") for node in before.node)
    return times, {"inserted": inserted, "left": len(steering), "absorbed_by": len(absorbed)}


def steering_nodes(before: onnx.GraphProto, after: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """Names of the optimised graph's steering nodes, and of other nodes that absorbed one.

    A node absorbed a steering node when it reads what only steering nodes read before. Constants do not
    count: the optimiser lets equal ones be shared by all who need them.
    """
    ours = [node for node in before.node if node.name.startswith("sarsteer.")]
    constants = {tensor.name for tensor in before.initializer}
    read_by_others = {
        name for node in before.node if not node.name.startswith("sarsteer.") for name in node.input
    }
    private = (
        {name for node in ours for name in (*node.input, *node.output) if name} - constants - read_by_others
    )
    private -= {value.name for value in (*before.input, *before.output)}
    left = {node.name for node in after.node if node.name.startswith("sarsteer.")}
    absorbed = {
        node.name for node in after.node if node.name not in left and private.intersection(node.input)
    }
    return left, absorbed


def _by_run(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Node events of a profile by run, in order: a node belongs to the run whose time span holds it."""
    spans = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith(NODE_SUFFIX)]
    return [[node for node in nodes if span["ts"] <= node["ts"] < span["ts"] + span["dur"]] for span in spans]


def _microseconds(events: Sequence[dict[str, Any]], names: set[str] | None = None) -> float:
    return float(
        sum(
            event["dur"]
            for event in events
            if names is None or event["name"].removesuffix(NODE_SUFFIX) in names
        )
    )
