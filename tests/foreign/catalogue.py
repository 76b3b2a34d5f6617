"""Every kind of decoder graph, steered: plans, measures, limits, and the table of `docs/decoders.md`.

`python -m tests.foreign.catalogue`, from the repository root, measures every kind and writes the table.

Dimensions: B batch, S sequence of this pass, P past, T = P + S, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import Qwen2ForCausalLM

from calibration.lalm import Lalm, load_lalm
from calibration.plan import Add, Edit, Positions, Project, Site, SteeringPlan
from graph_passes.onnx_file import write_graph
from graph_passes.opened_calls import OPENED_KEY
from graph_passes.patch import PatchResult, patch_model
from tests import decoders, tiny_lalm
from tests.conftest import random_basis, random_vector
from tests.decoders import TinyDecoder, session
from tests.foreign.cases import (
    CASES,
    FLOAT32_ATOL,
    Case,
    ForeignGraph,
    Outputs,
    Pass,
    blocks_and_norm,
    open_case,
)
from tests.reference import literally_steered

TABLE = Path(__file__).resolve().parents[2] / "docs" / "decoders.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
LAST, ALL = Positions.LAST, Positions.ALL
INPUT, OUTPUT, NORM = Site.BLOCK_INPUT, Site.BLOCK_OUTPUT, Site.FINAL_NORM_OUTPUT


def own_graph(case: Case, decoder: TinyDecoder) -> ForeignGraph:
    """One of the exports of `tests/decoders.py` with the language model of the tiny audio-language model beside it."""
    whole: Any = decoder.model
    model: Any = Qwen2ForCausalLM(whole.get_decoder().config).eval()
    model.model, model.lm_head = whole.get_decoder(), whole.get_output_embeddings()
    return ForeignGraph(case, decoder.path.parent, model)


OWN: dict[str, tuple[Case, str, Callable[[Lalm, Path], TinyDecoder]]] = {
    case.name: (case, fixture, export)
    for case, fixture, export in (
        (
            Case("own_wrapper", "`sarsteer-export export`: transformers 5.23.0 OnnxExporter", embeds=True),
            "exported_decoder",
            decoders.export_with_transformers,
        ),
        (
            Case("own_fused", 'the same, `ort_fusions="cpu"`', embeds=True),
            "fused_decoder",
            partial(decoders.export_with_transformers, ort_fusions="cpu"),
        ),
        (
            Case("own_dynamo", "`torch.onnx.export(dynamo=True)` of torch 2.13", embeds=True),
            "dynamo_decoder",
            decoders.export_with_dynamo,
        ),
        (
            Case("own_torchscript", "`torch.onnx.export(dynamo=False)` of torch 2.13", embeds=True),
            "torchscript_decoder",
            decoders.export_with_torchscript,
        ),
    )
}
"""Graphs that other tests make of the tiny audio-language model: the case, the fixture that holds it, the export."""
ALL_CASES = (*CASES, *(case for case, _, _ in OWN.values()))


@dataclass(frozen=True)
class Limits:
    """What a kind is held to: the largest deviation of logits, keys and values, and of the effect on logits.

    The effect is steered − unsteered, on each side of its own: the least cosine, and how far the ratio of norms may
    be from 1.
    """

    outputs: float
    cosine: float
    norm: float


@dataclass(frozen=True)
class Figures:
    """What was measured of one plan, the worst of all passes: as `Limits`, and the least norm of an effect."""

    outputs: float
    cosine: float
    norm: float
    effect: float

    def within(self, limits: Limits) -> bool:
        """Whether every figure is within its limit."""
        return self.outputs <= limits.outputs and self.cosine >= limits.cosine and self.norm <= limits.norm


FLOAT32_LIMITS = Limits(FLOAT32_ATOL, 0.999999, 1e-5)
"""Measured: cosine above 1 − 1e-11, norm ratio within 2e-6."""
LIMITS: Mapping[str, Limits] = {
    "genai_gemma2": Limits(5e-3, 0.99999, 2e-3),  # measured 1.5e-3, 1 − 5e-8, 6e-4
    "transformers_fp16": Limits(6e-3, 0.99999, 1e-3),  # measured 2.3e-3, 1 − 7e-7, 3e-4
    "transformers_bf16": Limits(1.5e-2, 0.9999, 2e-3),  # measured 5.3e-3, 1 − 3e-6, 6e-4
    "dynamic": Limits(0.3, 0.98, 0.05),  # measured 0.13, 1 − 5e-3, 0.013
    "qdq_static": Limits(1.5, 0.97, 0.1),  # measured 0.92, 1 − 0.012, 0.037
}
"""As far as kinds that are not float32 differ from PyTorch; unsteered, `Case.atol_reason` says why."""


def limits_of(case: Case) -> Limits:
    """What a kind is held to."""
    return LIMITS.get(case.name, FLOAT32_LIMITS)


def plan_of(foreign: ForeignGraph, *edits: Edit) -> SteeringPlan:
    """A plan of some edits for the model of a case."""
    config = foreign.model.config
    return SteeringPlan(int(config.hidden_size), int(config.num_hidden_layers), edits)


def add(foreign: ForeignGraph, layer: int, site: Site, positions: Positions) -> Add:
    """An addition whose vector is of the size of the stream's own states."""
    width = int(foreign.model.config.hidden_size)
    return Add(layer, random_vector(width, seed=layer), site=site, positions=positions, strength=0.7)


def project(foreign: ForeignGraph, layer: int, site: Site, positions: Positions) -> Project:
    """A projection of rank 4 around a mean."""
    width = int(foreign.model.config.hidden_size)
    mean = random_vector(width, seed=layer + 50, scale=0.3)
    basis = random_basis(width, 4, seed=layer)
    return Project(layer, basis, mean, site=site, positions=positions, strength=0.9)


def mixed_plan(foreign: ForeignGraph) -> SteeringPlan:
    """Both operations at last and at all positions, at every site; the input of block 0 among them."""
    return plan_of(
        foreign,
        add(foreign, 0, INPUT, ALL),
        add(foreign, 0, OUTPUT, LAST),
        project(foreign, 1, INPUT, ALL),
        project(foreign, 1, OUTPUT, LAST),
        add(foreign, 2, INPUT, LAST),
        project(foreign, 2, OUTPUT, ALL),
        add(foreign, 2, NORM, ALL),
        project(foreign, 2, NORM, LAST),
    )


def last_plan(foreign: ForeignGraph) -> SteeringPlan:
    """One addition at the last position, which the negative controls differ from."""
    return plan_of(foreign, add(foreign, 1, OUTPUT, LAST))


def bias_plan(foreign: ForeignGraph) -> SteeringPlan:
    """Additions at all positions that each have a tensor to themselves."""
    return plan_of(foreign, add(foreign, 0, OUTPUT, ALL), add(foreign, 2, OUTPUT, ALL))


def plans(foreign: ForeignGraph) -> dict[str, SteeringPlan]:
    """Every plan that a kind is measured with."""
    return {"mixed": mixed_plan(foreign), "bias": bias_plan(foreign), "last": last_plan(foreign)}


def controls(foreign: ForeignGraph) -> dict[str, SteeringPlan]:
    """Plans that `last_plan` must be told from."""
    edit = last_plan(foreign).edits[0]
    return {
        "sign": plan_of(foreign, dataclasses.replace(edit, strength=-edit.strength)),
        "layer": plan_of(foreign, dataclasses.replace(edit, layer=0)),
        "positions": plan_of(foreign, dataclasses.replace(edit, positions=ALL)),
    }


Sessions = tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]
Chain = list[tuple[Pass, Outputs]]


@dataclass(frozen=True)
class Steered:
    """The graphs of a case with a plan in them, for prefill and for decode, often one."""

    results: tuple[PatchResult, ...]
    sessions: Sessions


class Bench:
    """A case with what its unsteered sides answer, computed once."""

    def __init__(self, foreign: ForeignGraph) -> None:
        self.foreign, self.case = foreign, foreign.case

    @cached_property
    def graphs(self) -> tuple[onnx.ModelProto, ...]:
        """The unsteered graphs: one, or that of prefill and that of decode."""
        paths = dict.fromkeys((self.foreign.prefill_path, self.foreign.decode_path))
        return tuple(onnx.load(path) for path in paths)

    def steer(self, plan: SteeringPlan) -> Steered:
        """Patch every graph of the case."""
        results = tuple(patch_model(graph, plan) for graph in self.graphs)
        runners = [self.runnable(result.model) for result in results]
        return Steered(results, (runners[0], runners[-1]))

    def runnable(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """A session on CPU, as the case runs there."""
        if self.case.dtype is not torch.bfloat16:
            return session(model)
        with tempfile.TemporaryDirectory() as folder:
            write_graph(model, Path(folder) / "model.onnx")
            return self.foreign.runnable(Path(folder) / "model.onnx")

    @cached_property
    def plain(self) -> dict[str, tuple[Chain, Chain]]:
        """What the unsteered graph and model answer under every padding."""
        return {
            padding: (self.by_graph(self.foreign.sessions, padding), self.by_model(None, padding))
            for padding in self.case.paddings
        }

    def by_graph(self, sessions: Sessions, padding: str) -> Chain:
        """Prefill, and decode from the caches that it left, in ONNX Runtime."""
        return self._chain(padding, lambda step, number: self.foreign.run(sessions[number], step))

    def by_model(self, plan: SteeringPlan | None, padding: str) -> Chain:
        """The same in PyTorch, steered by the equations."""

        def run(step: Pass, _number: int) -> Outputs:
            blocks, norm = blocks_and_norm(self.foreign.model)
            steering: Any = literally_steered(blocks, norm, plan, step.mask_BT) if plan else nullcontext()
            with steering:
                return self.foreign.eager(step)

        return self._chain(padding, run)

    def _chain(self, padding: str, run: Callable[[Pass, int], Outputs]) -> Chain:
        first = self.foreign.first(padding)
        before = run(first, 0)
        step = self.foreign.next(first, before.presents)
        return [(first, before), (step, run(step, 1))]

    def oracle(self, plan: SteeringPlan) -> dict[str, Chain]:
        """What the PyTorch model steered by `plan` answers under every padding."""
        return {padding: self.by_model(plan, padding) for padding in self.case.paddings}

    def compare(self, sessions: Sessions, oracle: Mapping[str, Chain]) -> Figures:
        """The worst of every padding, prefill and decode, between steered graphs and a steered model."""
        found = []
        for padding, expected in oracle.items():
            chains = zip(self.by_graph(sessions, padding), expected, *self.plain[padding], strict=True)
            for (_, got), (step, wanted), (_, plain_got), (_, plain_wanted) in chains:
                attended_BS = step.attended
                effect = (got.logits - plain_got.logits)[attended_BS].ravel()
                wanted_effect = (wanted.logits - plain_wanted.logits)[attended_BS].ravel()
                deviation = max(
                    np.abs(got.logits - wanted.logits)[attended_BS].max(),
                    *self._cache_deviations(step, got.presents, wanted.presents),
                )
                found.append((float(deviation), *_effect(effect, wanted_effect)))
        deviations, cosines, norms, effects = zip(*found, strict=True)
        return Figures(max(deviations), min(cosines), max(norms), min(effects))

    def _cache_deviations(
        self, step: Pass, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        deviations = []
        for one, other in zip(got, wanted, strict=True):
            columns = (
                self.foreign.attended(step, one, graph=True),
                self.foreign.attended(step, other, graph=False),
            )
            assert columns[0].shape == columns[1].shape
            deviations.append(np.abs(columns[0] - columns[1]).max())
        return deviations


def _effect(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """Cosine, distance of the norm ratio from 1, and the norm that is wanted."""
    norms = float(np.linalg.norm(got.astype(np.float64))), float(np.linalg.norm(wanted.astype(np.float64)))
    cosine = float(got.astype(np.float64) @ wanted) / (norms[0] * norms[1]) if norms[0] else 0.0
    return cosine, abs(norms[0] / norms[1] - 1), norms[1]


# ---------------------------------------------------------------------------------------------------- the table

HEADER = (
    "kind",
    "exporter",
    "blocks",
    "`add` at all positions, alone",
    "calls opened",
    "outputs within",
    "effect: cosine from",
    "norm ratio within",
    "why not closer",
)


def row(bench: Bench) -> str:
    """The line of a kind in the table: what was found and done, and the limits that its figures were held to."""
    plan = bias_plan(bench.foreign)
    results = [patch_model(graph, plan) for graph in bench.graphs]
    blocks = {len(result.stream.blocks) for result in results}
    forms = dict.fromkeys(edit.form.value for result in results for edit in result.edits)
    mixed = patch_model(bench.graphs[0], mixed_plan(bench.foreign)).model.graph
    said = [entry for node in mixed.node for entry in node.metadata_props if entry.key == OPENED_KEY]
    opened = 1 + max((int(entry.value) for entry in said), default=-1)
    limits = limits_of(bench.case)
    cells = (
        f"`{bench.case.name}`",
        bench.case.exporter,
        ", ".join(map(str, sorted(blocks))),
        ", ".join(forms),
        str(opened) if bench.case.has_functions else "",
        f"{limits.outputs:g}",
        f"{limits.cosine:g}",
        f"{limits.norm:g}",
        bench.case.atol_reason,
    )
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> str:
    """The table between its markers."""
    head = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    return "\n".join([BEGIN, *head, *rows, END])


def with_table(document: str, rows: Sequence[str]) -> str:
    """A document whose table is that of `rows`."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + table(rows) + after


def measure(bench: Bench) -> dict[str, Figures]:
    """The figures of every plan."""
    figures = {}
    for name, plan in plans(bench.foreign).items():
        figures[name] = bench.compare(bench.steer(plan).sessions, bench.oracle(plan))
    return figures


def main() -> None:
    """Measure every kind, print the figures, and write the table when all are within their limits."""
    rows = []
    for case in ALL_CASES:
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(_open(case, Path(scratch)))
            for name, figures in measure(bench).items():
                print(
                    f"{case.name} {name}: outputs {figures.outputs:.1e}, cosine 1 - {1 - figures.cosine:.1e}, "
                    f"norm {figures.norm:.1e}"
                )
                if not figures.within(limits_of(case)):
                    raise SystemExit(f"{case.name}: {figures} is not within {limits_of(case)}")
            rows.append(row(bench))
    TABLE.write_text(with_table(TABLE.read_text(encoding="utf-8"), rows), encoding="utf-8")


def _open(case: Case, scratch: Path) -> ForeignGraph:
    if case.name not in OWN:
        return open_case(case, scratch)
    lalm = load_lalm(tiny_lalm.save_checkpoint(scratch / "checkpoint"))
    (scratch / "graph").mkdir()
    return own_graph(case, OWN[case.name][2](lalm, scratch / "graph"))


if __name__ == "__main__":
    main()
