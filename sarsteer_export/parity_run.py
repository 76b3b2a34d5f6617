"""One parity run: the oracle prepared, the export checked, the steered engine compared with it.

The order is the contract: nothing steered is compared before the unsteered export agrees with the eager model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.errors import InputError, ParityError
from calibration.plan import Add, Positions, Site
from engines.backends import CPU_BACKEND, find_backend
from engines.limits import Limits, limits_for
from engines.parity import Pair, agreement, compare_case
from engines.report import ParityReport
from engines.trace import Script, Trace, record
from graph_passes.onnx_file import read_graph
from graph_passes.patch import patch_model
from graph_passes.probe import expose_block_outputs
from graph_passes.residual_stream import ResidualStream, find_residual_stream
from graph_passes.selection import LastFrom, SteeringInputs
from sarsteer_export.around_decoder import AroundDecoder, compare_prompts, compare_rollouts
from sarsteer_export.controls import wrong_plans
from sarsteer_export.oracle import OracleCase, Padding, oracle_case
from sarsteer_export.parity_runtime import OnnxRuntimeParity, ParityRuntime
from sarsteer_export.versions import installed_versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnx import ModelProto

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from calibration.requests import SpokenRequest
    from calibration.states import Progress
    from sarsteer_export.bundle.bundle import Bundle


@dataclass(frozen=True)
class ParitySettings:
    """How parity is run: `prompts` per batch, `decode_steps` after the prefill, `blocks` compares block outputs."""

    prompts: int = 4
    decode_steps: int = 8
    blocks: bool = True
    backend: str = CPU_BACKEND.name
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("prompts", "decode_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class VerifiedExport:
    """An unsteered decoder that was found to agree with the eager model, and what that was found with."""

    unsteered: ModelProto
    data_folder: Path
    stream: ResidualStream
    cases: tuple[OracleCase, ...]
    baselines: tuple[Trace, ...]


@dataclass(frozen=True)
class ParityRun:
    """Parity of one model and plan on a few requests. `plan` must fit the model.

    `runtime`: where decoders run; by default the backend of `settings`, an execution provider of ONNX Runtime.
    """

    lalm: Lalm
    plan: SteeringPlan
    requests: Sequence[SpokenRequest]
    settings: ParitySettings
    progress: Progress | None = None
    runtime: ParityRuntime | None = None

    @property
    def limits(self) -> Limits:
        """The limits of this backend and precision."""
        return limits_for(self.settings.backend, self.settings.precision)

    def check_export(self, decoder: Path) -> VerifiedExport:
        """Check that an unsteered decoder agrees with the eager model, before anything steered is compared.

        Raises `ParityError` naming the figures that do not keep their limits.
        """
        unsteered = read_graph(decoder)
        stream = find_residual_stream(unsteered)
        export = VerifiedExport(unsteered, decoder.parent, stream, (), ())
        for padding in Padding:
            case = oracle_case(
                self.lalm,
                self.plan,
                self.requests,
                padding=padding,
                decode_steps=self.settings.decode_steps,
                stream=stream if self.settings.blocks else None,
            )
            trace = self._run_graph(unsteered, export, case.script)
            figures = agreement(
                f"{case.script.name}, export", case.script, case.traces.baseline, trace, self.limits
            )
            if failed := [item for item in figures if not item.passed]:
                raise ParityError(
                    "the unsteered export does not agree with the eager model: "
                    + "; ".join(
                        f"{item.what} {item.value:.3g} (limit {item.limit:g}) {item.detail}"
                        for item in failed
                    )
                )
            export = dataclasses.replace(
                export, cases=(*export.cases, case), baselines=(*export.baselines, trace)
            )
            self._report("parity of the export", len(export.cases))
        return export

    def check_around_decoder(self, bundle: Bundle) -> AroundDecoder:
        """Compare what the bundle's decoder reads, and what the bundle says, with the eager model.

        A bundle without something that makes prompts is compared from the decoder on, and the report says so.
        """
        if self.lalm.hears and bundle.manifest.missing:
            return AroundDecoder(
                (),
                tuple(
                    f"not in the bundle, so that neither prompts nor whole answers are compared: {name} ({reason})"
                    for name, reason in bundle.manifest.missing.items()
                ),
            )
        return AroundDecoder(
            compare_prompts(self.lalm, bundle, self.requests, self.limits),
            compare_rollouts(self.lalm, bundle, self.plan, self.requests),
        )

    def check_steering(self, export: VerifiedExport, decoder: Path, around: AroundDecoder) -> ParityReport:
        """Compare a steered decoder file or engine with the steered eager model, negative controls included."""
        results = []
        for padding, case, baseline in zip(Padding, export.cases, export.baselines, strict=True):
            edited = self._run_file(decoder, export, case.script)
            results.append(
                compare_case(
                    case.script,
                    case.traces,
                    Pair(baseline=baseline, edited=edited),
                    self.limits,
                    self._controls(export, case.script, baseline, padding),
                    expect_effect=self._has_effect,
                )
            )
            self._report("parity of the steering", len(results))
        return ParityReport(
            backend=self.settings.backend,
            precision=self.settings.precision,
            limits=self.limits,
            components=around.measurements,
            cases=tuple(results),
            context=self._context() | {"blocks": _norms(self.plan, export)},
            notes=around.rollouts,
        )

    def not_executed(self, reason: str) -> ParityReport:
        """The report of an engine that was built and cannot be run here."""
        return ParityReport(
            backend=self.settings.backend,
            precision=self.settings.precision,
            limits=self.limits,
            components=(),
            cases=(),
            context=self._context(),
            notes=(f"not executed: {reason}",),
        )

    @property
    def _has_effect(self) -> bool:
        return any(edit.strength for edit in self.plan.edits)

    def _controls(
        self, export: VerifiedExport, script: Script, baseline: Trace, padding: Padding
    ) -> list[tuple[str, Trace]]:
        """Traces of engines that are wrong on purpose; none for a plan that does nothing."""
        if not self._has_effect:
            return []
        wrong = {
            name: patch_model(export.unsteered, plan, force=True).model
            for name, plan in wrong_plans(self.plan).items()
        }
        if padding is Padding.RIGHT and any(edit.positions == Positions.LAST for edit in self.plan.edits):
            columns = SteeringInputs(last_from=LastFrom.SEQUENCE)
            last_column = patch_model(export.unsteered, self.plan, force=True, inputs=columns)
            wrong["last column instead of last attended"] = last_column.model
        return [
            ("unsteered", baseline),
            *((name, self._run_graph(graph, export, script)) for name, graph in wrong.items()),
        ]

    @property
    def _runtime(self) -> ParityRuntime:
        return self.runtime or OnnxRuntimeParity(find_backend(self.settings.backend))

    def _run_graph(self, graph: ModelProto, export: VerifiedExport, script: Script) -> Trace:
        probed = expose_block_outputs(graph, export.stream) if self.settings.blocks else graph
        with self._runtime.graph(probed, export.data_folder) as runner:
            return record(runner, script)

    def _run_file(self, decoder: Path, export: VerifiedExport, script: Script) -> Trace:
        """Run what is shipped: as it is, or with its blocks' outputs exposed."""
        if self.settings.blocks:
            beside = dataclasses.replace(export, data_folder=decoder.parent)
            return self._run_graph(read_graph(decoder), beside, script)
        with self._runtime.file(decoder) as runner:
            return record(runner, script)

    def _report(self, stage: str, done: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, len(Padding))

    def _context(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.settings),
            "plan_sha256": self.plan.digest(),
            "model": type(self.lalm.model).__name__,
            "model_fingerprint": self.lalm.fingerprint,
            "edits": len(self.plan.edits),
            "versions": installed_versions(
                "torch",
                "transformers",
                "onnx",
                "onnxruntime-gpu",
                "onnxruntime",
                "tensorrt",
                "tensorrt-rtx",
                "numpy",
            ),
            "torch_threads": torch.get_num_threads(),
        }


def parity_requests(*groups: Sequence[SpokenRequest], count: int) -> tuple[SpokenRequest, ...]:
    """`count` requests taken from the groups in turn, first ones first."""
    turns = [request for turn in zip(*groups, strict=False) for request in turn]
    rest = [request for group in groups for request in group if request not in turns]
    return tuple((turns + rest)[:count])


def _norms(plan: SteeringPlan, export: VerifiedExport) -> list[dict[str, float | int | None]]:
    """Per block: mean norm of the unsteered stream at last prompt positions, and norm of what is added there."""
    case = export.cases[0]
    prefill = case.traces.baseline.steps[0]
    rows: list[dict[str, float | int | None]] = []
    for block in export.stream.blocks:
        hidden = prefill[block.output][:, -1] if block.output in prefill else None
        added = [
            abs(edit.strength) * float(np.linalg.norm(edit.vector))
            for edit in plan.edits
            if isinstance(edit, Add) and (edit.layer, edit.site) == (block.index, Site.BLOCK_OUTPUT)
        ]
        rows.append(
            {
                "layer": block.index,
                "hidden_norm": None if hidden is None else float(np.linalg.norm(hidden, axis=-1).mean()),
                "edit_norm": sum(added),
            }
        )
    return rows
