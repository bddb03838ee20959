"""Forms batches of queued requests, runs them on the device, and gives each request its result.

`engine` does the rest: it admits requests, has their images decoded, and replies.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

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
from tome_server.execution.batch import BatchItem, ItemResult, Outputs
from tome_server.observability.metrics import Metrics, Promise, Stage
from tome_server.scheduling.policy.view import Decision
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import share_device
from tome_server.serving.overhead import Margin
from tome_server.serving.served import ServedModel

log = logging.getLogger(__name__)

# An idle device whose predictions are in doubt runs empty images, called probes, to correct them: the first PROBE_AFTER
# seconds after it became idle, each next one after a pause of PROBE_REST times what the last one took. After
# ENOUGH_PROBES the pauses become LONG_REST times as long as a probe.
PROBE_AFTER = 0.1
PROBE_REST = 4.0
ENOUGH_PROBES = 9
LONG_REST = 100.0
# Seconds from one refusal that puts predictions in doubt to the next that does.
DOUBT_AGAIN = 2.0


@dataclass(eq=False)
class Job:
    """A request on its way through decoding, queue and device."""

    served: "Served"
    outputs: Outputs
    exact: int | None
    """The r to run at, if the request names one."""
    ready: Callable[[float], float]
    """Returns when an image of this size would be decoded if it came now with a given deadline."""
    stage: Stage = Stage.DECODE
    """From COMPUTE on, its batch drops the slot."""
    slot: Slot = field(init=False)
    """Where its image lies, once that is decoded."""
    queued: float = field(init=False)
    """When it entered the queue."""
    result: "asyncio.Future[BatchedResult]" = field(init=False)


Served: TypeAlias = ServedModel[Job]


@dataclass(frozen=True, eq=False)
class OnDevice:
    """A batch that runs on the device, or an empty image."""

    key: str
    """Of its model, on the device."""
    model: str
    """Its model's name."""
    began: float
    promised: float
    """Seconds within which it should end."""


@dataclass(frozen=True)
class BatchedResult:
    """A request's result, and the batch that it ran in."""

    result: ItemResult
    r: int
    started: float
    """When the batch started."""
    seconds: float
    """What the whole batch took."""
    predicted: float
    """What it was expected to take."""
    batch_size: int


class Batcher:
    """The queues of all models of one device, and the batch that runs on it. `submit` needs `run` to be running."""

    def __init__(self, device: Device, metrics: Metrics, max_delay: float, margin: Margin) -> None:
        """`max_delay` is how many seconds requests may wait for batch-mates while the device is idle, unless their
        model says otherwise; `margin` is added to the smallest latency that a refusal names.
        """
        self._device = device
        self._metrics = metrics
        self._max_delay = max_delay
        self._margin = margin
        # All models that have requests, or may have some.
        self._models: list[Served] = []
        self._arrived = asyncio.Event()
        self._unanswered: set[Job] = set()
        self._ended = False
        self.on_device: OnDevice | None = None
        """The batch that is running, if any."""
        # When that should end; if none runs, when the last ended.
        self._free_at = -math.inf
        self._device_left = asyncio.Event()
        # When an idle device may run its next probe.
        self._rested_at = -math.inf
        # By model: until when its slowness has been forgotten, probes since its last batch, and when a refusal last put
        # its predictions in doubt.
        self._forgotten: dict[str, float] = {}
        self._probes: Counter[str] = Counter()
        self._doubted: dict[str, float] = {}
        self._in_doubt: set[str] = set()

    def add(self, served: Served) -> None:
        """Register a model. Its scheduler and the others' now account for each other's load."""
        self._models.append(served)
        share_device([each.scheduler for each in self._models])

    async def remove(self, served: Served) -> None:
        """Forget a model without requests, once it has left the device."""
        while self.on_device is not None and self.on_device.key == served.key:
            self._device_left.clear()
            await self._device_left.wait()
        self._models.remove(served)
        share_device([each.scheduler for each in self._models])
        self._forgotten.pop(served.key, None)
        self._probes.pop(served.key, None)
        self._doubted.pop(served.key, None)
        self._in_doubt.discard(served.key)

    def max_delay_of(self, served: Served) -> float:
        """Return how many seconds a model's requests may wait for batch-mates while the device is idle."""
        own = served.overrides.batching.max_delay
        return self._max_delay if own is None else own

    def check(self, waiting: Waiting[Job]) -> None:
        """Raise InfeasibleError if the deadline of a request that isn't decoded yet can't be met."""
        job = waiting.item
        scheduler = job.served.scheduler
        try:
            scheduler.check(waiting, _now(), self._free_at, job.ready)
        except InfeasibleError:
            if not self._doubt(job.served):
                raise
            scheduler.check(waiting, _now(), self._free_at, job.ready)

    def infeasible(self, waiting: Waiting[Job]) -> InfeasibleError:
        """Return the error for a request that is given up: it names the smallest latency that would be admitted now."""
        now, job = _now(), waiting.item
        earliest = job.served.scheduler.earliest(now, self._free_at, waiting.high, ready=job.ready)
        return InfeasibleError(earliest - now + self._margin.at(now))

    async def submit(self, waiting: Waiting[Job]) -> BatchedResult:
        """Queue a request whose image is decoded, and return its result. Raises a RequestError if there is none.

        When the caller is cancelled, the request leaves the queue; a batch already on the device runs to its end.
        """
        job = waiting.item
        scheduler = job.served.scheduler
        job.stage, job.queued, job.result = Stage.QUEUE, _now(), asyncio.get_running_loop().create_future()
        if self._ended:
            raise _stopped()
        try:
            scheduler.submit(waiting, job.queued, self._free_at)
        except InfeasibleError:
            if not self._doubt(job.served):
                raise
            scheduler.submit(waiting, job.queued, self._free_at)
        self._unanswered.add(job)
        self._queue_changed(job.served)
        self._arrived.set()
        try:
            return await job.result
        finally:
            self._unanswered.discard(job)
            if scheduler.cancel(waiting):
                self._queue_changed(job.served)

    async def run(self) -> None:
        """Run batches until cancelled. Raises DeviceDiedError if there is no device any more.

        However it ends, every request without a result then fails with UnavailableError.
        """
        try:
            while True:
                served, decision = await self._next()
                for waiting in decision.shed:
                    self._give_up(waiting)
                if decision.batch:
                    await self._run_batch(served, [waiting.item for waiting in decision.batch], decision.levels)
        finally:
            self._ended = True
            for job in self._unanswered:
                if not job.result.done():
                    job.result.set_exception(_stopped())
                    job.result.exception()  # its caller may have been cancelled together with this task

    def _doubt(self, served: Served) -> bool:
        """Doubt predictions that refuse a request while the device is idle; returns whether they were changed.

        As long as every request is refused, no batch corrects the predictions. So the longer ago the model's last batch
        is, the more of the slowness they learned is forgotten, and the device soon runs a probe.
        """
        now = _now()
        if not self._idle:
            return False
        if now - self._doubted.get(served.key, -math.inf) >= DOUBT_AGAIN:
            self._doubted[served.key] = now
            self._probes[served.key] = 0
            self._in_doubt.add(served.key)
            self._arrived.set()
        latency = served.scheduler.latency
        since = max(latency.learned_at, self._forgotten.get(served.key, -math.inf))
        if since == -math.inf:
            return False
        latency.forget_slowness(now - since)
        self._forgotten[served.key] = now
        self._drifted(served)
        return True

    @property
    def _idle(self) -> bool:
        """Whether no batch runs, and no request is queued or being decoded."""
        schedulers = (served.scheduler for served in self._models)
        return self.on_device is None and not any(len(each) or each.expected for each in schedulers)

    def _probe_next(self) -> Served | None:
        """Return a model whose predictions an idle device should probe; None if there is none, or it isn't idle."""
        if not self._idle:
            return None
        doubtful = [
            served for served in self._models if served.key in self._in_doubt or not served.scheduler.latency.settled
        ]
        return min(doubtful, key=lambda served: self._probes[served.key], default=None)

    async def _probe(self, served: Served) -> None:
        """Run one empty image at the most merging, and learn from it."""
        latency, level = served.scheduler.latency, served.scheduler.latency.levels - 1
        self._probes[served.key] += 1
        enough = self._probes[served.key] >= ENOUGH_PROBES
        if enough:
            self._in_doubt.discard(served.key)
        began = _now()
        self._begins(served, began, latency.promised(1, level))
        try:
            seconds = await self._device.probe(served.key, served.rs[level])
        except DeviceDiedError:
            raise
        except Exception:
            log.debug("model %s: an empty image could not be run", served.model.name, exc_info=True)
            return
        finally:
            self.on_device, self._free_at = None, _now()
            self._rested_at = self._free_at + (LONG_REST if enough else PROBE_REST) * (self._free_at - began)
            self._device_left.set()
        latency.observe([level], seconds, _now())
        self._drifted(served)

    async def _next(self) -> tuple[Served, Decision]:
        """Wait until a batch should start, and return the decision of the model with the earliest deadline."""
        while True:
            waiting = [served for served in self._models if len(served.scheduler)]
            start = min(map(self._start, waiting), default=None)
            now = _now()
            for served in self._models:
                if served.scheduler.latency.age(now):
                    self._drifted(served)
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
            except TimeoutError:  # requests have waited long enough for batch-mates, or it is time for a probe
                if doubtful and self._idle:
                    await self._probe(doubtful)

    def _start(self, served: Served) -> float:
        """Return when a model's next batch should start: at once if it is full.

        Else after its `max_delay`, unless its first deadline is too near, or when its policy wants it to.
        """
        scheduler, latency = served.scheduler, served.scheduler.latency
        if len(scheduler) >= latency.max_batch:
            return -math.inf
        # What a full batch takes at the most merging: the earliest deadline must leave time for that.
        needed = latency.promised(latency.max_batch, latency.levels - 1)
        delayed = min(scheduler.waiting_since + self.max_delay_of(served), scheduler.deadline - needed)
        return max(delayed, scheduler.start(_now()))

    def _decide(self, served: Served, now: float) -> Decision | None:
        scheduler = served.scheduler
        failures = scheduler.policy_failures
        decision = scheduler.next(now)
        self._metrics.of_model(served.model.name).policy_failures.inc(scheduler.policy_failures - failures)
        self._queue_changed(served)
        return decision

    def _give_up(self, waiting: Waiting[Job]) -> None:
        if not waiting.item.result.done():
            waiting.item.result.set_exception(self.infeasible(waiting))

    async def _run_batch(self, served: Served, batch: Sequence[Job], levels: Sequence[int]) -> None:
        """Run a batch, or if it fails its parts, and set the results of its members."""
        latency = served.scheduler.latency
        rs = [served.rs[level] if job.exact is None else job.exact for job, level in zip(batch, levels, strict=True)]
        for job in batch:
            job.stage = Stage.COMPUTE
        failure: Exception | None = None
        started, predicted = _now(), latency.of_batch(levels)
        promised = latency.of_batch(levels, promised=True)
        self._begins(served, started, promised)
        try:
            items = [BatchItem(job.slot, job.outputs) for job in batch]
            done = await self._device.run(served.key, items, rs, served.profile.one_call)
        except DeviceDiedError:
            raise
        except Exception as error:
            failure = error
        finally:
            self.on_device, self._free_at = None, _now()
            self._device_left.set()
        if failure is not None:
            await self._run_parts(served, batch, levels, failure)
            return
        # What the same batch would have taken unmerged, had it run when this one did.
        unmerged = latency.expected(len(batch), 0)
        self._probes[served.key] = 0
        ratio = latency.observe(levels, done.seconds, self._free_at)
        metrics = self._metrics.of_model(served.model.name)
        metrics.batch_size.observe(len(batch))
        metrics.prediction_ratio.observe(ratio)
        metrics.promises[Promise.KEPT if done.seconds <= promised else Promise.BROKEN].inc()
        metrics.drift.set(latency.drift)
        metrics.compute_seconds.inc(done.seconds)
        metrics.speedup_ratio.observe(unmerged / done.seconds)
        for job, r, result in zip(batch, rs, done.results, strict=True):
            job.slot.drop()
            if job.result.done():  # its caller has gone, or its deadline passed
                metrics.wasted_seconds.inc(done.seconds / len(batch))
            else:
                job.result.set_result(BatchedResult(result, r, started, done.seconds, predicted, len(batch)))

    async def _run_parts(self, served: Served, batch: Sequence[Job], levels: Sequence[int], failure: Exception) -> None:
        """Retry a failed batch: in halves if memory ran out, else one image at a time.

        A request that fails alone gets the error.
        """
        name, no_memory = served.model.name, isinstance(failure, OutOfMemoryError)
        if len(batch) == 1:
            [job] = batch
            job.slot.drop()
            if no_memory:
                log.error("model %s lacks memory for one image: %s", name, failure)
            else:
                log.error("model %s failed", name, exc_info=failure)
            if not job.result.done():
                job.result.set_exception(
                    NoMemoryError(f"model {name} has no memory left on the device for this image")
                    if no_memory
                    else ModelFailedError(f"model {name} failed on this input")
                )
            return
        if no_memory:
            self._metrics.of_model(name).halved_batches.inc()
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
                if job.result.done():  # its caller has gone
                    job.slot.drop()
                else:
                    rest.append((job, level))
            first += part
            if rest:
                await self._run_batch(served, [job for job, _ in rest], [level for _, level in rest])

    def _begins(self, served: Served, now: float, promised: float) -> None:
        self.on_device, self._free_at = OnDevice(served.key, served.model.name, now, promised), now + promised

    def _queue_changed(self, served: Served) -> None:
        self._metrics.of_model(served.model.name).queue_depth.set(len(served.scheduler))

    def _drifted(self, served: Served) -> None:
        self._metrics.of_model(served.model.name).drift.set(served.scheduler.latency.drift)


def _stopped() -> UnavailableError:
    return UnavailableError("the server has stopped")


def _now() -> float:
    return asyncio.get_running_loop().time()
