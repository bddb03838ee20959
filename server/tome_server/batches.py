"""Forms batches of the requests that wait, runs them on the device, and gives each request its share.

Knows nothing of what a request asked for but its place in the queue and its bounds: `engine` admits, decodes and
replies.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tome_server.errors import (
    DeviceDiedError,
    InfeasibleError,
    ModelFailedError,
    NoMemoryError,
    OutOfMemoryError,
    UnavailableError,
)
from tome_server.observability.metrics import Metrics
from tome_server.overhead import Overhead
from tome_server.runtime.device import Device
from tome_server.runtime.shared_images import Slot
from tome_server.runtime.work import Result, Work
from tome_server.scheduling.policy.view import Decision
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler
from tome_server.served import ServedModel

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A decoded request on its way through queue and device."""

    served: "Served"
    exact: int | None
    """The r to run at, where the request names it."""
    work: Work[Slot]
    answer: "asyncio.Future[Answer]"
    queued: float
    """when it entered the queue"""
    taken: bool = False
    """whether it left the queue for the device, which then gives the slot back"""


Served: TypeAlias = ServedModel[Job]


@dataclass(frozen=True)
class Answer:
    """A job's share of its batch."""

    result: Result
    r: int
    started: float
    """when the batch started"""
    seconds: float
    """what the whole batch took"""
    predicted: float
    batch_size: int


class Batches:
    """What waits for one device, and what runs on it. `run` must be running while `answer` is called.

    `max_delay` is how many seconds requests may wait for batch-mates while the device is idle, unless their model says
    otherwise; `overhead` is what a request that is given up is told to allow for.
    """

    def __init__(self, device: Device, metrics: Metrics, max_delay: float, overhead: Overhead) -> None:
        self._device = device
        self._metrics = metrics
        self._max_delay = max_delay
        self._overhead = overhead
        # All models that have requests, or may have some, and their schedulers.
        self._models: list[Served] = []
        self._schedulers: list[Scheduler[Job]] = []
        self._arrived = asyncio.Event()
        self._unanswered: set[Job] = set()
        self._ended = False
        # The key of the model on the device, and when the batch there should end; without one, when the last did.
        self._on_device: str | None = None
        self._free_at = -math.inf
        self._device_left = asyncio.Event()

    def add(self, served: Served) -> None:
        """Have a model's scheduler reckon with those of the others, and the others with it."""
        self._models.append(served)
        self._schedulers.append(served.scheduler)
        served.scheduler.sharing = self._schedulers

    async def remove(self, served: Served) -> None:
        """Forget a model that nobody waits for any more, once it has left the device."""
        while self._on_device == served.key:
            self._device_left.clear()
            await self._device_left.wait()
        self._models.remove(served)
        self._schedulers.remove(served.scheduler)

    def longest_delay(self, served: Served) -> float:
        """Return how many seconds a model's requests may wait for batch-mates while the device is idle."""
        return self._max_delay if served.own.max_delay is None else served.own.max_delay

    def check(self, served: Served, waiting: Waiting[Any]) -> None:
        """Raise InfeasibleError if a request that is yet to be decoded can't be met."""
        served.scheduler.check(waiting, _now() + self._overhead.decoding, self._free_at)

    async def answer(self, waiting: Waiting[Job]) -> Answer:
        """Return a request's share of the batch that it came into. Raises a RequestError if it gets none.

        When the caller is cancelled, it leaves the queue; a batch already on the device runs to its end.
        """
        job = waiting.item
        scheduler = job.served.scheduler
        if self._ended:
            raise _stopped()
        self._unanswered.add(job)
        if not len(scheduler):
            job.served.waiting_since = job.queued
        scheduler.submit(waiting, job.queued, self._free_at)
        self._queue_changed(job.served)
        self._arrived.set()
        try:
            return await job.answer
        finally:
            self._unanswered.discard(job)
            if scheduler.cancel(waiting):
                self._queue_changed(job.served)

    async def run(self) -> None:
        """Run batches until cancelled. Raises DeviceDiedError if there is no device any more.

        However it ends, who still waits for an answer is told that there will be none.
        """
        try:
            while True:
                served, decision = await self._next()
                for waiting in decision.shed:
                    self._give_up(served, waiting)
                if decision.batch:
                    await self._run_batch(served, [waiting.item for waiting in decision.batch], decision.levels)
        finally:
            self._ended = True
            for job in self._unanswered:
                if not job.answer.done():
                    job.answer.set_exception(_stopped())
                    job.answer.exception()  # who waited may have been cancelled with this

    def forget_drift(self, served: Served) -> None:
        """Let an idle device's predictions return to its profile: while all is refused, no batch would correct them."""
        now = _now()
        if self._on_device is None and not any(map(len, self._schedulers)) and self._free_at > -math.inf:
            served.scheduler.latency.idle(now - self._free_at)
            self._free_at = now
            self._metrics.drift.labels(served.model.name).set(served.scheduler.latency.drift)

    async def _next(self) -> tuple[Served, Decision]:
        """Return the next decision: that of the model whose earliest deadline is the earliest."""
        while True:
            waiting = [served for served in self._models if len(served.scheduler)]
            start = min(map(self._start, waiting), default=None)
            now = _now()
            if start is not None and start <= now:
                urgent = min(waiting, key=lambda served: served.scheduler.deadline)
                decision = self._decide(urgent, now)
                if decision is not None:
                    return urgent, decision
                continue
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(start):
                    await self._arrived.wait()
            except TimeoutError:
                pass  # those who wait have waited long enough for mates

    def _start(self, served: Served) -> float:
        """Return when the device need idle no longer: after `max_delay`, at once if a batch is full or time short."""
        scheduler, latency = served.scheduler, served.scheduler.latency
        if len(scheduler) >= latency.max_batch:
            return -math.inf
        # The time that those who wait would take if the most were merged, and they had the mates they wait for.
        needed = latency.promised(latency.max_batch, latency.levels - 1)
        return min(served.waiting_since + self.longest_delay(served), scheduler.deadline - needed)

    def _decide(self, served: Served, now: float) -> Decision | None:
        scheduler = served.scheduler
        failures = scheduler.policy_failures
        decision = scheduler.next(now)
        self._metrics.policy_failures.labels(served.model.name).inc(scheduler.policy_failures - failures)
        self._queue_changed(served)
        return decision

    def _give_up(self, served: Served, waiting: Waiting[Job]) -> None:
        now, answer = _now(), waiting.item.answer
        if not answer.done():
            earliest = served.scheduler.earliest(now + self._overhead.decoding, self._free_at, waiting.high)
            answer.set_exception(InfeasibleError(earliest - now + self._overhead.margin))

    async def _run_batch(self, served: Served, batch: Sequence[Job], levels: Sequence[int]) -> None:
        """Run a batch, or if it fails its parts, and answer its members."""
        model, latency = served.model, served.scheduler.latency
        rs = [served.rs[level] if job.exact is None else job.exact for job, level in zip(batch, levels, strict=True)]
        for job in batch:
            job.taken = True
        failure: Exception | None = None
        started, predicted = _now(), latency.of_batch(levels)
        promised = latency.of_batch(levels, promised=True)
        self._on_device, self._free_at = served.key, started + promised
        try:
            done = await self._device.run(served.key, [job.work for job in batch], rs, served.profile.packed)
        except DeviceDiedError:
            raise
        except Exception as error:
            failure = error
        finally:
            self._on_device, self._free_at = None, _now()
            self._device_left.set()
        if failure is not None:
            await self._run_parts(served, batch, levels, failure)
            return
        # What the same batch would have taken unmerged, had it run when this one did.
        unmerged = latency.expected(len(batch), 0)
        ratio = latency.observe(levels, done.seconds)
        metrics = self._metrics
        metrics.batch_size.labels(model.name).observe(len(batch))
        metrics.prediction_ratio.labels(model.name).observe(ratio)
        metrics.promises.labels(model.name, "kept" if done.seconds <= promised else "broken").inc()
        metrics.drift.labels(model.name).set(latency.drift)
        metrics.compute_seconds.labels(model.name).inc(done.seconds)
        metrics.speedup_ratio.labels(model.name).observe(unmerged / done.seconds)
        for job, r, result in zip(batch, rs, done.results, strict=True):
            job.work.image.drop()
            if job.answer.done():  # its caller has gone, or its deadline passed
                metrics.wasted_seconds.labels(model.name).inc(done.seconds / len(batch))
            else:
                job.answer.set_result(Answer(result, r, started, done.seconds, predicted, len(batch)))

    async def _run_parts(self, served: Served, batch: Sequence[Job], levels: Sequence[int], failure: Exception) -> None:
        """Run a batch that failed in halves if memory ran out, else one by one; who fails alone is told so."""
        name, no_memory = served.model.name, isinstance(failure, OutOfMemoryError)
        if len(batch) == 1:
            [job] = batch
            job.work.image.drop()
            if no_memory:
                log.error("model %s lacks memory for one image: %s", name, failure)
            else:
                log.error("model %s failed", name, exc_info=failure)
            if not job.answer.done():
                job.answer.set_exception(
                    NoMemoryError(f"model {name} has no memory left on the device for this image")
                    if no_memory
                    else ModelFailedError(f"model {name} failed on this input")
                )
            return
        if no_memory:
            self._metrics.halved_batches.labels(name).inc()
            served.scheduler.latency.allow(math.ceil(len(batch) / 2))
            log.warning(
                "model %s lacks memory for a batch of %d; running its halves, and from now on no more than %d at once, "
                "until it is loaded anew: %s",
                name, len(batch), served.scheduler.latency.max_batch, failure,
            )  # fmt: skip
        else:
            log.error("model %s failed on a batch of %d; running its images alone", name, len(batch), exc_info=failure)
        first = 0
        while first < len(batch):
            # A half may turn out to be too large as well.
            part = served.scheduler.latency.max_batch if no_memory else 1
            rest: list[tuple[Job, int]] = []
            for job, level in zip(batch[first : first + part], levels[first : first + part], strict=True):
                if job.answer.done():  # its caller has gone
                    job.work.image.drop()
                else:
                    rest.append((job, level))
            first += part
            if rest:
                await self._run_batch(served, [job for job, _ in rest], [level for _, level in rest])

    def _queue_changed(self, served: Served) -> None:
        self._metrics.queue_depth.labels(served.model.name).set(len(served.scheduler))


def _stopped() -> UnavailableError:
    return UnavailableError("the server has stopped")


def _now() -> float:
    return asyncio.get_running_loop().time()
