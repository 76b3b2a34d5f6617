"""All requests through the model, batch by batch, until nothing is left of them but statistics.

Dimensions: B batch, L decoder blocks, D width.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.audio_once import features_extracted_once
from calibration.batches import Batch, plan_batches
from calibration.clips import Clips
from calibration.directions import check_finite
from calibration.errors import SarsteerError
from calibration.kept_prompts import KeptStore, at_home
from calibration.lalm import encode_requests
from calibration.magnitudes import LargestMagnitudes, Measured, recorded_magnitudes
from calibration.placement import input_device
from calibration.processes import OtherProcessError, Processes
from calibration.prompt_passes import PromptPasses, Verdict
from calibration.statistics import StateStatistics, added, total
from calibration.steered import steered
from calibration.unfinished import Found, UnfinishedFile
from calibration.workers import in_order, one_thread_each, sharing_weights, worker_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.lalm import Lalm
    from calibration.plan import SteeringPlan
    from calibration.prompt_passes import Inputs, PromptPass
    from calibration.requests import SpokenRequest
    from calibration.states import Progress

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
"""How often what was found so far is written, beside at the end of an interrupted run."""


@dataclass(frozen=True)
class Collecting:
    """How a collection is run, without effect on what comes out.

    `batch_size`: requests per pass. `unfinished`: where to keep what an interrupted run found, and to go on from.
    """

    batch_size: int = 16
    progress: Progress | None = None
    unfinished: UnfinishedFile | None = None
    processes: Processes = field(default_factory=Processes)
    save_seconds: float = SAVE_SECONDS


@dataclass(frozen=True)
class _Runner:
    """One model that batches are run on, and what is measured of it."""

    lalm: Lalm
    record: LargestMagnitudes
    passes: PromptPasses


@dataclass(frozen=True)
class _Done:
    """What came of one batch; magnitudes (L,) of all that its runner saw so far."""

    prompts: PromptPass
    statistics: StateStatistics
    largest_L: NDArray[np.float32]
    before_last_L: NDArray[np.float32]


class Collection:
    """The requests of one calibration, on their way through a model. Use in the order of its methods.

    `harmful`, `benign`: requests whose clips were checked. `store` keeps what the steered pass needs.
    """

    def __init__(
        self,
        lalm: Lalm,
        requests: tuple[Sequence[SpokenRequest], Sequence[SpokenRequest]],
        refusal_prompt: str,
        store: KeptStore,
        how: Collecting,
        clips: Clips | None = None,
    ) -> None:
        self._lalm = lalm
        self._harmful, self._benign = requests
        self._refusal_prompt = refusal_prompt
        self._store = store
        self._how = how
        self._clips = clips or Clips(lalm)
        self._found = Found.nothing(len(lalm.parts.blocks))
        self._done: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        self._counts: dict[str, int] = {}
        self._shown: dict[str, int] = {}

    def begin(self, *, resume: bool = True) -> None:
        """Take up what earlier runs found, and say so; without `resume`, throw it away."""
        processes, file = self._how.processes, self._how.unfinished
        found: Found | None = None
        if processes.first and file is not None:
            if resume:
                found = file.load()
            if found is None:
                file.remove()
            elif processes.count > 1:  # one file now, before the others write anew
                file.save(found, 0)
                for other in file.files()[1:]:
                    other.unlink()
        done = (sorted(found.harmful), sorted(found.benign)) if found is not None else ([], [])
        harmful = processes.tell("harmful", done[0])
        self._done = (frozenset(harmful), frozenset(processes.tell("benign", done[1])))
        if found is not None:
            self._found = found
            logger.warning(
                "going on with the unfinished calibration in %s: %d of %d requests are done",
                file.path if file is not None else "",
                found.count,
                len(self._harmful) + len(self._benign),
            )

    def collect(self) -> tuple[StateStatistics, list[float]]:
        """Run all that is not done yet (METHOD, calibration 1 and 2): statistics, and the largest |h| of every block.

        The refusal text is concatenated to the prompt verbatim, in the same user turn; the audio is the same. Raises
        `InputError` where the stream is not finite.
        """
        batches = plan_batches(
            *([self._length(request) for request in kind] for kind in (self._harmful, self._benign)),
            size=self._how.batch_size,
            done=self._done,
        )
        with self._kept_when_interrupted():
            self._run(self._how.processes.share(batches))
            self._found = self._how.processes.joined(self._found)
        for stage, requests in (("harmful", self._harmful), ("benign", self._benign)):
            self._show(stage, len(requests), len(requests))  # other processes may have ended after this one
        record = LargestMagnitudes(len(self._lalm.parts.blocks))
        record.include(self._found.largest_L, self._found.before_last_L)
        return total(self._found.parts), record.per_block(steered=False)

    def _length(self, request: SpokenRequest) -> int:
        """What the length of a prompt goes by: its audio, then its text."""
        return self._clips.samples(request) + len(request.text)

    def _run(self, batches: Sequence[Batch]) -> None:
        saved = time.monotonic()
        for batch, done in self._batches_run(batches):
            self._how.processes.check()
            self._store.keep(batch, done.prompts)
            self._take(batch, done)
            if time.monotonic() - saved > self._how.save_seconds:
                self._save()
                saved = time.monotonic()

    def _batches_run(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, _Done]]:
        """What comes of each batch, in order; several are run at once where that is faster."""
        verdict = Verdict()  # every process and every run, resumed or not, compares anew
        with ExitStack() as stack:
            models = [self._lalm]
            count = min(worker_count(self._lalm), len(batches))
            if count > 1:
                stack.enter_context(one_thread_each())
                models += [sharing_weights(self._lalm) for _ in range(count - 1)]
            runners = []
            for model in models:
                record = stack.enter_context(recorded_magnitudes(model.parts))
                runner = _Runner(model, record, PromptPasses(model, record, verdict))
                stack.enter_context(runner.passes.prepared())
                runners.append(runner)
            if count > 1:
                # The first one alone: it tells whether the others may be run on from a cache.
                yield batches[0], self._alone(runners[0], batches[0])
                yield from in_order(runners, batches[1:], self._alone)
            else:
                for batch, encoded in self._encoded(batches):
                    yield batch, self._pass(runners[0], encoded)

    def _alone(self, runner: _Runner, batch: Batch) -> _Done:
        return self._pass(runner, self._encode(runner.lalm, batch))

    def _pass(self, runner: _Runner, encoded: tuple[Inputs, Inputs | None]) -> _Done:
        inputs, longer = encoded
        record = runner.record
        if longer is None:
            prompts = runner.passes.single(inputs)
            record.per_block(steered=False)
            states_BLD = prompts.states_BLD.numpy()
            check_finite("benign", states_BLD)
            statistics = StateStatistics.of_benign(states_BLD)
        else:
            prompts, refused_BLD = runner.passes.pair(inputs, longer)
            record.per_block(steered=False)
            for name, states in (("harmful", prompts.states_BLD), ("refused", refused_BLD)):
                check_finite(name, states.numpy())
            statistics = StateStatistics.of_pairs(prompts.states_BLD.numpy(), refused_BLD.numpy())
        return _Done(prompts, statistics, record.largest_L(), record.before_last_L())

    def _take(self, batch: Batch, done: _Done) -> None:
        found, rows = self._found, frozenset(batch.rows)
        # One assignment: an interrupt falls before or after it, and never leaves half a batch.
        self._found = Found(
            added(found.parts, done.statistics),
            found.harmful | rows if batch.harmful else found.harmful,
            found.benign if batch.harmful else found.benign | rows,
            np.maximum(found.largest_L, done.largest_L),
            np.maximum(found.before_last_L, done.before_last_L),
        )
        stage, requests = ("harmful", self._harmful) if batch.harmful else ("benign", self._benign)
        before = len(self._done[0 if batch.harmful else 1])
        self._report(stage, len(rows), before, len(requests))

    def _report(self, stage: str, more: int, before: int, count: int) -> None:
        self._counts[stage] = self._counts.get(stage, 0) + more
        processes = self._how.processes
        done = processes.finished(stage, more) if processes.count > 1 else self._counts[stage]
        self._show(stage, before + done, count)

    def _show(self, stage: str, done: int, count: int) -> None:
        if self._how.progress is not None and self._how.processes.first and self._shown.get(stage) != done:
            self._shown[stage] = done
            self._how.progress(stage, done, count)

    @contextmanager
    def _kept_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except SarsteerError as error:
            if isinstance(error, OtherProcessError):
                self._save()
            raise
        except KeyboardInterrupt:
            if not self._save():
                raise
            count = len(self._harmful) + len(self._benign)
            raise KeyboardInterrupt(
                f"interrupted; {self._found.count} of {count} requests are done and kept in {self._file()}; "
                "the same command goes on from there, with --no-resume it starts anew"
            ) from None
        except BaseException:
            self._save()
            raise

    def _file(self) -> Path:
        assert self._how.unfinished is not None  # noqa: S101 - asked only where there is one
        return self._how.unfinished.of_process(self._how.processes.rank)

    def _save(self) -> bool:
        """Write what was found so far, if there is anything and it is to be kept; whether it was written."""
        if self._how.unfinished is None or not self._found.parts:
            return False
        try:
            self._how.unfinished.save(self._found, self._how.processes.rank)
        except OSError as error:  # what is being done, or the error under way, matters more
            logger.warning("%s: what was found so far cannot be kept (%s)", self._file(), error.strerror)
            return False
        return True

    def _encoded(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, tuple[Inputs, Inputs | None]]]:
        """Batches with their inputs, those of the next being made while the model runs, if it runs elsewhere."""
        if input_device(self._lalm.model).type == "cpu":  # the same cores would do both
            yield from ((batch, self._encode(self._lalm, batch)) for batch in batches)
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming: list[tuple[Batch, Any]] = []
            for batch in batches:
                coming.append((batch, ahead.submit(self._encode, self._lalm, batch)))
                if len(coming) > 1:
                    first, inputs = coming.pop(0)
                    yield first, inputs.result()
            for first, inputs in coming:
                yield first, inputs.result()

    def _encode(self, lalm: Lalm, batch: Batch) -> tuple[Inputs, Inputs | None]:
        requests = self._requests(batch)
        clips = self._clips.load(requests)
        texts = [request.text for request in requests]
        if not batch.harmful:
            return encode_requests(lalm, texts, clips), None
        with features_extracted_once(lalm):
            return (
                encode_requests(lalm, texts, clips),
                encode_requests(lalm, [text + self._refusal_prompt for text in texts], clips),
            )

    def _prompts(self, batch: Batch) -> Inputs:
        requests = self._requests(batch)
        return encode_requests(self._lalm, [request.text for request in requests], self._clips.load(requests))

    def _requests(self, batch: Batch) -> list[SpokenRequest]:
        source = self._harmful if batch.harmful else self._benign
        return [source[row] for row in batch.rows]

    # ------------------------------------------------------------------------------------------------- steered

    def steered_magnitudes(self, plan: SteeringPlan) -> list[float]:
        """The largest |h| of every block over all prompts, steered by a plan that edits the last position alone.

        What comes before that position is as in the unsteered passes. Raises `InputError` where the steered stream is
        not finite.
        """
        with (
            self._kept_when_interrupted(),
            steered(self._lalm.parts, plan),
            recorded_magnitudes(self._lalm.parts) as record,
        ):
            before_L = self._found.before_last_L
            record.include(before_L, before_L)
            passes = PromptPasses(self._lalm, record)
            with passes.prepared():
                self._run_kept(passes, record)
                self._run_others(passes)
            largest_L = self._how.processes.largest("steered", record.largest_L())
            count = len(self._harmful) + len(self._benign)
            self._show("steered", count, count)
            record.include(largest_L, largest_L)
            return record.per_block(steered=True)

    def _run_kept(self, passes: PromptPasses, record: LargestMagnitudes) -> None:
        for kept in self._store.kept:
            self._how.processes.check()
            if kept.past is not None:
                past = at_home(kept.past)
                last = past.mask_BP.new_ones(len(kept.batch.rows), 1)
                with record.taking(Measured.REFUSED):
                    self._lalm.model(
                        **kept.last,
                        attention_mask=torch.cat([past.mask_BP, last], dim=1),
                        past_key_values=past.cache,
                        use_cache=True,
                    )
            else:
                passes.replayed(self._prompts(kept.batch), kept.audio.restored())
            self._report_steered(len(kept.batch.rows))

    def _run_others(self, passes: PromptPasses) -> None:
        """Requests of earlier runs, of which nothing was kept."""
        others = [
            Batch(harmful, tuple(rows[start : start + self._how.batch_size]))
            for harmful, rows in ((True, sorted(self._done[0])), (False, sorted(self._done[1])))
            for start in range(0, len(rows), self._how.batch_size)
        ]
        for batch in self._how.processes.share(others):
            self._how.processes.check()
            passes.whole(self._prompts(batch))
            self._report_steered(len(batch.rows))

    def _report_steered(self, more: int) -> None:
        self._report("steered", more, 0, len(self._harmful) + len(self._benign))
