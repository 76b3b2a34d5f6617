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
from calibration.kept_prompts import KeptPrompts, KeptStore, at_home
from calibration.lalm import encode_requests
from calibration.magnitudes import LargestMagnitudes, Measured, recorded_magnitudes
from calibration.placement import input_device
from calibration.processes import OtherProcessError, Processes
from calibration.prompt_passes import PromptPasses, Verdict
from calibration.statistics import StateStatistics, added, total
from calibration.steered import steered
from calibration.unfinished import Found, UnfinishedFile
from calibration.workers import FirstAlone, in_order, one_thread_each, sharing_weights, worker_count

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
        self._models = [lalm]

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
        self._clips.read((*self._harmful, *self._benign))
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
        with self._runners(len(batches)) as runners:
            if len(runners) > 1:
                yield from in_order(runners, batches, FirstAlone(self._encode_for, self._pass, batches[0]))
            else:
                for batch, encoded in self._encoded(batches):
                    yield batch, self._pass(runners[0], encoded)

    @contextmanager
    def _runners(self, batches: int, plan: SteeringPlan | None = None) -> Iterator[list[_Runner]]:
        """As many as run this many batches at once, steered by a plan if there is one."""
        verdict = Verdict()  # every process and every run, resumed or not, compares anew
        with ExitStack() as stack:
            count = max(1, min(worker_count(self._lalm), batches))
            if count > 1:
                stack.enter_context(one_thread_each())
            self._models += [sharing_weights(self._lalm) for _ in range(count - len(self._models))]
            runners = []
            for model in self._models[:count]:
                if plan is not None:
                    stack.enter_context(steered(model.parts, plan))
                record = stack.enter_context(recorded_magnitudes(model.parts))
                runner = _Runner(model, record, PromptPasses(model, record, verdict))
                stack.enter_context(runner.passes.prepared())
                runners.append(runner)
            yield runners

    def _encode_for(self, runner: _Runner, batch: Batch) -> tuple[Inputs, Inputs | None]:
        return self._encode(runner.lalm, batch)

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
        with features_extracted_once(lalm):
            inputs = encode_requests(lalm, texts, clips)
            if not batch.harmful:
                return inputs, None
            return inputs, encode_requests(lalm, [text + self._refusal_prompt for text in texts], clips)

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
        batches: list[KeptPrompts | Batch] = [*self._store.kept, *self._of_earlier_runs()]
        with self._kept_when_interrupted(), self._runners(len(batches), plan) as runners:
            for batch, _ in in_order(runners, batches, self._steer):
                self._how.processes.check()
                rows = (batch.batch if isinstance(batch, KeptPrompts) else batch).rows
                self._report("steered", len(rows), 0, len(self._harmful) + len(self._benign))
            record, before_L = runners[0].record, self._found.before_last_L
            for largest_L in (before_L, *(runner.record.largest_L() for runner in runners[1:])):
                record.include(largest_L, before_L)
            largest_L = self._how.processes.largest("steered", record.largest_L())
            count = len(self._harmful) + len(self._benign)
            self._show("steered", count, count)
            record.include(largest_L, largest_L)
            return record.per_block(steered=True)

    def _of_earlier_runs(self) -> Sequence[Batch]:
        """This process's share of the requests of earlier runs, of which nothing was kept."""
        size = self._how.batch_size
        return self._how.processes.share(
            [
                Batch(harmful, tuple(rows[start : start + size]))
                for harmful, rows in ((True, sorted(self._done[0])), (False, sorted(self._done[1])))
                for start in range(0, len(rows), size)
            ]
        )

    def _steer(self, runner: _Runner, batch: KeptPrompts | Batch) -> None:
        """Run prompts for the measurements alone, with as little as was not kept of them."""
        if isinstance(batch, Batch):
            runner.passes.whole(self._prompts(batch))
        elif batch.past is None:
            runner.passes.replayed(self._prompts(batch.batch), batch.audio.restored())
        else:
            past = at_home(batch.past)
            last = past.mask_BP.new_ones(len(batch.batch.rows), 1)
            with runner.record.taking(Measured.REFUSED):
                runner.lalm.model(
                    **batch.last,
                    attention_mask=torch.cat([past.mask_BP, last], dim=1),
                    past_key_values=past.cache,
                    use_cache=True,
                )
