"""Forms batches of the requests that wait, runs them on the device, and gives each request its share.

Knows nothing of what a request asked for but its place in the queue and its bounds: `engine` admits, decodes and
replies.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tome_server.device.client import Device
from tome_server.device.shared_images import Slot
from tome_server.errors import (
    DeviceDiedError,
    InfeasibleError,
    ModelFailedError,
    NoMemoryError,
    OutOfMemoryError,
    UnavailableError,
)
from tome_server.execution.batch import BatchItem, ItemResult
from tome_server.observability.metrics import Metrics
from tome_server.scheduling.policy.view import Decision
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler, at_once
from tome_server.serving.overhead import Margin
from tome_server.serving.served import ServedModel

log = logging.getLogger(__name__)

# An idle device whose predictions are in doubt runs empty images to correct them: the first so many seconds after it
# became idle, the next when it has rested for so many times what the last one took. Once so many have said the same, it
# rests longer.
PROBE_AFTER = 0.1
PROBE_REST = 4.0
ENOUGH_PROBES = 9
LONG_REST = 100.0
# A refusal puts predictions in doubt again after so many seconds.
DOUBT_AGAIN = 2.0


@dataclass(eq=False)
class Job:
    """A decoded request on its way through queue and device."""

    served: "Served"
    exact: int | None
    """The r to run at, where the request names it."""
    work: BatchItem[Slot]
    answer: "asyncio.Future[Answer]"
    queued: float
    """when it entered the queue"""
    ready: Callable[[float], float]
    """when a request like it, of a given deadline, would be decoded if it came now"""
    taken: bool = False
    """whether it left the queue for the device, which then gives the slot back"""


Served: TypeAlias = ServedModel[Job]


@dataclass(frozen=True)
class Answer:
    """A job's share of its batch."""

    result: ItemResult
    r: int
    started: float
    """when the batch started"""
    seconds: float
    """what the whole batch took"""
    predicted: float
    batch_size: int


class Batcher:
    """What waits for one device, and what runs on it. `run` must be running while `answer` is called.

    `max_delay` is how many seconds requests may wait for batch-mates while the device is idle, unless their model says
    otherwise; `margin` is what a request that is given up is told to allow for.
    """

    def __init__(self, device: Device, metrics: Metrics, max_delay: float, margin: Margin) -> None:
        self._device = device
        self._metrics = metrics
        self._max_delay = max_delay
        self._margin = margin
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
        # Until when an idle device's slowness has been forgotten, and when it may run its next empty image.
        self._forgotten = -math.inf
        self._rested_at = -math.inf
        # By model: empty images since its last batch, and when predictions were last doubted because they refused.
        self._probes: Counter[str] = Counter()
        self._doubted: dict[str, float] = {}
        self._in_doubt: set[str] = set()

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
        self._probes.pop(served.key, None)
        self._doubted.pop(served.key, None)
        self._in_doubt.discard(served.key)

    def longest_delay(self, served: Served) -> float:
        """Return how many seconds a model's requests may wait for batch-mates while the device is idle."""
        return self._max_delay if served.own.max_delay is None else served.own.max_delay

    def check(self, served: Served, waiting: Waiting[Any], ready: Callable[[float], float] = at_once) -> None:
        """Raise InfeasibleError if a request can't be met; `ready` says when one of a given deadline is decoded."""
        try:
            served.scheduler.check(waiting, _now(), self._free_at, ready)
        except InfeasibleError:
            if not self._doubt(served):
                raise
            served.scheduler.check(waiting, _now(), self._free_at, ready)

    def earliest(self, served: Served, high: int, ready: Callable[[float], float] = at_once) -> float:
        """Return the earliest deadline that `check` would let pass now, for a highest level of `high`."""
        return served.scheduler.earliest(_now(), self._free_at, high, ready=ready)

    async def answer(self, waiting: Waiting[Job]) -> Answer:
        """Return a request's share of the batch that it came into. Raises a RequestError if it gets none.

        When the caller is cancelled, it leaves the queue; a batch already on the device runs to its end.
        """
        job = waiting.item
        scheduler = job.served.scheduler
        if self._ended:
            raise _stopped()
        self.check(job.served, waiting)
        if not len(scheduler):
            job.served.waiting_since = job.queued
        scheduler.submit(waiting, job.queued, self._free_at)
        self._unanswered.add(job)
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

    def _doubt(self, served: Served) -> bool:
        """Doubt predictions that refuse a request though the device is idle; returns whether they were changed.

        While all is refused, no request's batch would ever correct them. So what is slow is forgotten with the time
        that the device has been idle, and the device soon runs images of its own to find out.
        """
        now = _now()
        if not self._idle:
            return False
        if now - self._doubted.get(served.key, -math.inf) >= DOUBT_AGAIN:
            self._doubted[served.key] = now
            self._probes[served.key] = 0
            self._in_doubt.add(served.key)
            self._arrived.set()
        since = max(self._free_at, self._forgotten)
        if since == -math.inf:
            return False
        served.scheduler.latency.forget_slowness(now - since)
        self._forgotten = now
        self._metrics.drift.labels(served.model.name).set(served.scheduler.latency.drift)
        return True

    @property
    def _idle(self) -> bool:
        """Whether the device does nothing, and nothing is on its way to it."""
        return self._on_device is None and not any(len(one) or one.expected for one in self._schedulers)

    def _probe_next(self) -> Served | None:
        """Return a model whose predictions an idle device had better find out about."""
        if not self._idle:
            return None
        doubtful = [
            served for served in self._models if served.key in self._in_doubt or not served.scheduler.latency.settled
        ]
        return min(doubtful, key=lambda served: self._probes[served.key], default=None)

    async def _probe(self, served: Served) -> None:
        """Run one empty image, merged the most, and learn from it."""
        latency, level = served.scheduler.latency, served.scheduler.latency.levels - 1
        self._probes[served.key] += 1
        enough = self._probes[served.key] >= ENOUGH_PROBES
        if enough:
            self._in_doubt.discard(served.key)
        began = _now()
        self._on_device, self._free_at = served.key, began + latency.promised(1, level)
        try:
            seconds = await self._device.probe(served.key, served.rs[level])
        except DeviceDiedError:
            raise
        except Exception:
            log.debug("model %s: an empty image could not be run", served.model.name, exc_info=True)
            return
        finally:
            self._on_device, self._free_at = None, _now()
            self._rested_at = self._free_at + (LONG_REST if enough else PROBE_REST) * (self._free_at - began)
            self._device_left.set()
        latency.observe([level], seconds)
        self._metrics.drift.labels(served.model.name).set(latency.drift)

    async def _next(self) -> tuple[Served, Decision]:
        """Return the next decision: that of the model whose earliest deadline is the earliest."""
        while True:
            waiting = [served for served in self._models if len(served.scheduler)]
            start = min(map(self._start, waiting), default=None)
            now = _now()
            if start is not None and start <= now:
                urgent = min(waiting, key=lambda served: served.scheduler.urgency)
                decision = self._decide(urgent, now)
                if decision is not None:
                    return urgent, decision
                continue
            self._arrived.clear()
            doubtful = self._probe_next() if start is None else None
            if doubtful:
                start = max(self._free_at + PROBE_AFTER, self._rested_at)
            try:
                async with asyncio.timeout_at(start):
                    await self._arrived.wait()
            except TimeoutError:  # requests have waited long enough for batch-mates, or there are none
                if doubtful and self._idle:
                    await self._probe(doubtful)

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
            earliest = self.earliest(served, waiting.high, waiting.item.ready)
            answer.set_exception(InfeasibleError(earliest - now + self._margin.at(now)))

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
        self._probes[served.key] = 0
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
