"""The life of a request between the wire and the device: admit, decode, queue, batch, answer.

Asyncio throughout; images are decoded in a pool of threads and batches run in the device's process, so that nothing
blocks the event loop.
"""

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tome_server.caller import Shares
from tome_server.errors import (
    ClientLimitError,
    DeviceDiedError,
    ExpiredError,
    InfeasibleError,
    InvalidRequestError,
    ModelFailedError,
    NoMemoryError,
    OutOfMemoryError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.mac_count import MacCount
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import Preprocess
from tome_server.observability.ended import Answered, Ended, Observer, Trace, Tracer
from tome_server.observability.metrics import Metrics, exemplar
from tome_server.runtime.device import Device
from tome_server.runtime.shared_images import Slot
from tome_server.runtime.work import Result, Work
from tome_server.scheduling.policy.view import Decision
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler
from tome_server.served import Bounds, ServedModel

log = logging.getLogger(__name__)

FLOPS_PER_MAC = 2
# What a refused client is told to wait: about the time that a few batches take.
RETRY_AFTER = 0.1
DEFAULT_TOP_K = 5
# Characters of an unknown model's name that its refusal repeats.
NAME_SHOWN = 100
# Replies whose way back from the device says what the next one's will take, and the share that it must be enough for.
REPLIES_REMEMBERED = 64
REPLIES_IN_TIME = 0.95
# How fast the estimate of what decoding takes follows.
DECODE_RATE = 0.1


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG, PNG, WebP or BMP file."""

    data: bytes


@dataclass(frozen=True)
class Pixels:
    """[H, W, 3] uint8 RGB."""

    shape: Sequence[int]
    data: bytes


@dataclass(frozen=True)
class Normalised:
    """[C, H, W] float32, the model's own input."""

    shape: Sequence[int]
    data: bytes


@dataclass(frozen=True)
class Request:
    """One image to classify. Times are in seconds of the event loop's clock."""

    model: str
    """Empty for the first model."""
    input: EncodedImage | Pixels | Normalised
    arrival: float
    deadline: float = math.inf
    """Infinite for the model's default budget."""
    r: int | None = None
    min_r: int | None = None
    max_r: int | None = None
    min_quality: float | None = None
    top_k: int | None = None
    features: bool = False
    token_map: bool = False
    logits: bool = False
    """Whether the reply holds the logits of all classes."""
    patches: bool = False
    """Whether the reply holds the features of each patch."""
    trace_id: str | None = None
    """Of the recorded trace it belongs to, as 32 hexadecimal digits: metrics name it as their exemplar.
    What an engine that makes traces says of that itself comes in its place."""


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds."""

    decode: float
    queue: float
    compute: float
    predicted: float
    """what the batch was expected to take"""
    total: float
    slack: float
    """Deadline less the time of the answer."""
    batch_size: int


@dataclass(frozen=True)
class Reply:
    """A prediction and what was done for it."""

    model: HostedModel
    result: Result
    r: int
    cost: MacCount
    timing: Timing

    @property
    def flops(self) -> int:
        """Operations done, those of merging included."""
        return FLOPS_PER_MAC * self.cost.total

    @property
    def flops_saved(self) -> int:
        """Operations the unmerged model would have done, less those done."""
        return FLOPS_PER_MAC * (self.cost.dense - self.cost.total)


@dataclass(eq=False)
class _Job:
    """A decoded request on its way through queue and device."""

    served: "Served"
    exact: int | None
    """The r to run at, where the request names it."""
    work: Work[Slot]
    answer: "asyncio.Future[_Answer]"
    queued: float
    """when it entered the queue"""
    taken: bool = False
    """whether it left the queue for the device, which then gives the slot back"""


Served: TypeAlias = ServedModel[_Job]


@dataclass(frozen=True)
class _Answer:
    """A job's share of its batch."""

    result: Result
    r: int
    started: float
    """when the batch started"""
    seconds: float
    """what the whole batch took"""
    predicted: float
    batch_size: int


@dataclass
class Engine:
    """Answers requests for the models in service with one device. `run` must be running while `predict` is called."""

    device: Device
    metrics: Metrics
    max_delay: float
    """Seconds that requests may wait for batch-mates while the device is idle, unless their model says otherwise."""
    max_pending: int
    """Requests held at once; one more is refused. A model may allow itself less."""
    reply_margin: float
    """The least that is kept back from each deadline for the way back, in seconds; more where measured."""
    decode_threads: int
    names: list[str] = field(default_factory=list)
    """Of all models that are or will be served, the one for requests that name none first."""
    models: dict[str, Served] = field(default_factory=dict)
    """Those that are loaded, by name."""
    max_client_requests: int | None = None
    """Requests held at once for one client; one more is refused."""
    observers: Sequence[Observer] = ()
    """Told of each request's end."""
    tracer: Tracer | None = None
    """Makes traces of requests; metrics then name these as exemplars, those begun here too."""
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once new requests are refused because the server is stopping."""

    def __post_init__(self) -> None:
        self._pending = 0
        # Of all models that have requests, or may have some.
        self._schedulers: list[Scheduler[_Job]] = []
        for served in self.models.values():
            self._share(served)
        self._shares = Shares(self.max_client_requests, RETRY_AFTER)
        self._unanswered: set[_Job] = set()
        self._ended = False
        self.leaving: list[Served] = []
        """Models that have been replaced or retired, and still have requests to answer."""
        # Requests in the engine by the model's key, and the key of the model on the device.
        self._held: Counter[str] = Counter()
        self._on_device: str | None = None
        self._released = asyncio.Event()
        self.metrics.pending_limit.set(self.max_pending)
        self._arrived = asyncio.Event()
        self._decoders = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")
        # When the batch on the device should end; without one, when the last did.
        self._free_at = -math.inf
        # About what decoding takes, in seconds.
        self._decoding = 0.0
        # From the device's last operation to the finished reply, of the latest replies.
        self._ways_back: deque[float] = deque([0.0], REPLIES_REMEMBERED)

    def model(self, name: str) -> Served:
        """Return a model in service, the first if unnamed.

        Raises UnknownModelError, or UnavailableError if it is loading or there is none at all.
        """
        name = name or self.default_name
        if not name:
            raise UnavailableError("no model is in service")
        if name not in self.names:
            # The caller's text goes into the status, and gRPC drops statuses of more than a few kilobytes.
            raise UnknownModelError(name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}…", self.names)
        if name not in self.models:
            raise UnavailableError(f"model {name} is loading")
        return self.models[name]

    @property
    def default_name(self) -> str:
        """Name of the model for requests that name none; empty if there is no model."""
        return self.names[0] if self.names else ""

    def expect(self, name: str) -> None:
        """Answer requests for a model with UnavailableError until it is served."""
        self.names.append(name)

    def forget(self, name: str) -> None:
        """Answer requests for a model that was expected with UnknownModelError again."""
        self.names.remove(name)

    def serve(self, served: Served) -> Served | None:
        """Answer new requests for a model that was expected, or is served; returns what was, to wait for by `left`."""
        before = self.models.get(served.model.name)
        self.models[served.model.name] = served
        self._share(served)
        if before:
            self.leaving.append(before)
        return before

    def retire(self, name: str) -> Served:
        """Refuse new requests for a model, which is returned, to wait for by `left`. Raises what `model` does."""
        served = self.model(name)
        self.names.remove(served.model.name)
        self.leaving.append(self.models.pop(served.model.name))
        return served

    def most_pending(self, served: Served) -> int:
        """Return how many requests for a model are held at once; one more is refused."""
        return self.max_pending if served.own.max_pending is None else min(served.own.max_pending, self.max_pending)

    def longest_delay(self, served: Served) -> float:
        """Return how many seconds a model's requests may wait for batch-mates while the device is idle."""
        return self.max_delay if served.own.max_delay is None else served.own.max_delay

    async def left(self, served: Served) -> None:
        """Wait until a model that was replaced or retired has answered the requests that it still had."""
        while self._held[served.key] or self._on_device == served.key:
            self._released.clear()
            await self._released.wait()
        self.leaving.remove(served)
        self._schedulers.remove(served.scheduler)

    @contextmanager
    def holding(self, served: Served) -> Iterator[None]:
        """Keep a model, replaced or retired meanwhile, until requests that name it to `predict` are answered."""
        self._held[served.key] += 1
        try:
            yield
        finally:
            self._held[served.key] -= 1
            self._released.set()

    async def predict(self, request: Request, served: Served | None = None) -> Reply:
        """Answer one request, by `served` if that is held. Raises a RequestError that says why it can't be answered.

        When the caller is cancelled, the request leaves the queue; a batch already on the device runs to its end.
        """
        trace = self.tracer(_now() - request.arrival) if self.tracer else None
        if trace:
            request = replace(request, trace_id=trace.id)
        try:
            reply = await self._predict(request, served)
        except BaseException as error:
            self._tell(request, trace, None, error)
            raise
        self._tell(request, trace, reply, None)
        return reply

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

    def drain(self) -> None:
        """Refuse new requests from now on; those already here are answered."""
        self.draining.set()

    async def answered(self) -> None:
        """Wait until nobody waits for an answer any more."""
        while any(self._held.values()):
            self._released.clear()
            await self._released.wait()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._decoders.shutdown(cancel_futures=True)

    def _tell(self, request: Request, trace: Trace | None, reply: Reply | None, error: BaseException | None) -> None:
        answer = None
        if reply is not None:
            answer = Answered(
                r=reply.r,
                tokens_in=reply.cost.tokens_in,
                tokens_out=reply.cost.tokens[-1],
                flops=reply.flops,
                flops_saved=reply.flops_saved,
                decode=reply.timing.decode,
                queue=reply.timing.queue,
                compute=reply.timing.compute,
                total=reply.timing.total,
                slack=reply.timing.slack,
                batch_size=reply.timing.batch_size,
            )
        ended = Ended(request.model or next(iter(self.names), ""), _now() - request.arrival, answer, error)
        for observer in self.observers:
            observer(ended)
        if trace:
            trace.end(ended)

    async def _predict(self, request: Request, served: Served | None) -> Reply:
        if self.draining.is_set():
            raise UnavailableError("the server is shutting down")
        served = served or self.model(request.model)
        bounds = served.bounds(request.r, request.min_r, request.max_r, request.min_quality)
        top_k = _top_k(served.model, request)
        if math.isinf(request.deadline):
            request = replace(request, deadline=request.arrival + served.default_budget)
        try:
            with self.holding(served), self._shares.hold():
                reply = await self._answer(served, bounds, top_k, request)
        except ClientLimitError:
            self.metrics.rejected.labels(served.model.name, "client_limit").inc()
            raise
        except asyncio.CancelledError:
            # gRPC ends calls at their deadline, which on a busy machine may be before we get to it.
            if _now() >= request.deadline - self.reply_margin:
                self.metrics.slo_missed.labels(served.model.name, "expired").inc(exemplar=exemplar(request.trace_id))
            raise
        except Exception as error:
            if missed := _MISSED.get(type(error)) if isinstance(error, RequestError) else "failed":
                self.metrics.slo_missed.labels(served.model.name, missed).inc(exemplar=exemplar(request.trace_id))
            raise
        if reply.timing.slack >= 0:
            self.metrics.slo_met.labels(served.model.name).inc()
        else:
            self.metrics.slo_missed.labels(served.model.name, "late").inc(exemplar=exemplar(request.trace_id))
        return reply

    async def _answer(self, served: Served, bounds: Bounds, top_k: int, request: Request) -> Reply:
        name, scheduler = served.model.name, served.scheduler
        for held, most in ((self._pending, self.max_pending), (served.pending, self.most_pending(served))):
            if held >= most:
                self.metrics.rejected.labels(name, "queue_full").inc()
                raise OverloadedError(held, RETRY_AFTER)
        self._pending += 1
        served.pending += 1
        self.metrics.pending.set(self._pending)
        job = slot = None
        try:
            margin = self._margin()
            # As the scheduler sees it: who asks must allow the margin as well.
            limits = (request.arrival - margin, request.deadline - margin, bounds.low, bounds.high)
            scheduler.arrived(request.arrival, request.deadline - request.arrival)
            # Before decoding: what can't be met is refused before it costs anything.
            scheduler.check(Waiting(None, *limits), _now() + self._decoding, self._free_at)
            async with asyncio.timeout_at(request.deadline - self.reply_margin):
                slot = await self._decode(served, request)
                work = Work(slot, top_k, request.features, request.token_map, request.logits, request.patches)
                job = _Job(served, bounds.exact, work, asyncio.get_running_loop().create_future(), _now())
                answer = await self._wait(Waiting(job, *limits))
        except TimeoutError:
            stage = "decode" if job is None else "compute" if job.taken else "queue"
            raise ExpiredError(stage, request.deadline - request.arrival) from None
        except InfeasibleError:
            self.metrics.rejected.labels(name, "infeasible").inc()
            self._forget_drift(served)
            raise
        finally:
            self._pending -= 1
            served.pending -= 1
            self.metrics.pending.set(self._pending)
            if slot is not None and not (job and job.taken):
                slot.drop()
        return self._reply(job, answer, request)

    async def _decode(self, served: Served, request: Request) -> Slot:
        """Prepare the image where the device finds it."""
        began = _now()
        decoding = self._decoders.submit(self._prepare, served, request.input)
        try:
            slot = await asyncio.wrap_future(decoding)
        except asyncio.CancelledError:
            # The thread can't be stopped, and may have a slot in the end.
            decoding.add_done_callback(_drop_decoded)
            raise
        self._decoding += DECODE_RATE * (_now() - began - self._decoding)
        return slot

    def _prepare(self, served: Served, source: EncodedImage | Pixels | Normalised) -> Slot:
        return self.device.put(served.key, _prepared(served.model.preprocess, source))

    async def _wait(self, waiting: Waiting[_Job]) -> _Answer:
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

    async def _next(self) -> tuple[Served, Decision]:
        """Return the next decision: that of the model whose earliest deadline is the earliest."""
        while True:
            waiting = [served for served in self._all() if len(served.scheduler)]
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
        self.metrics.policy_failures.labels(served.model.name).inc(scheduler.policy_failures - failures)
        self._queue_changed(served)
        return decision

    def _give_up(self, served: Served, waiting: Waiting[_Job]) -> None:
        now, answer = _now(), waiting.item.answer
        if not answer.done():
            earliest = served.scheduler.earliest(now + self._decoding, self._free_at, waiting.high)
            answer.set_exception(InfeasibleError(earliest - now + self._margin()))

    async def _run_batch(self, served: Served, batch: Sequence[_Job], levels: Sequence[int]) -> None:
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
            done = await self.device.run(served.key, [job.work for job in batch], rs, served.profile.packed)
        except DeviceDiedError:
            raise
        except Exception as error:
            failure = error
        finally:
            self._on_device, self._free_at = None, _now()
            self._released.set()
        if failure is not None:
            await self._run_parts(served, batch, levels, failure)
            return
        # What the same batch would have taken unmerged, had it run when this one did.
        unmerged = latency.expected(len(batch), 0)
        ratio = latency.observe(levels, done.seconds)
        metrics = self.metrics
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
                job.answer.set_result(_Answer(result, r, started, done.seconds, predicted, len(batch)))

    async def _run_parts(
        self, served: Served, batch: Sequence[_Job], levels: Sequence[int], failure: Exception
    ) -> None:
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
            self.metrics.halved_batches.labels(name).inc()
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
            rest: list[tuple[_Job, int]] = []
            for job, level in zip(batch[first : first + part], levels[first : first + part], strict=True):
                if job.answer.done():  # its caller has gone
                    job.work.image.drop()
                else:
                    rest.append((job, level))
            first += part
            if rest:
                await self._run_batch(served, [job for job, _ in rest], [level for _, level in rest])

    def _reply(self, job: _Job, answer: _Answer, request: Request) -> Reply:
        now = _now()
        model = job.served.model
        name, cost = model.name, model.cost(answer.r)
        timing = Timing(
            decode=job.queued - request.arrival,
            queue=answer.started - job.queued,
            compute=answer.seconds,
            predicted=answer.predicted,
            total=now - request.arrival,
            slack=request.deadline - now,
            batch_size=answer.batch_size,
        )
        self._ways_back.append(now - answer.started - answer.seconds)
        reply = Reply(model, answer.result, answer.r, cost, timing)
        metrics, trace = self.metrics, exemplar(request.trace_id)
        metrics.request_duration.labels(name).observe(timing.total, trace)
        metrics.stage_duration.labels(name, "decode").observe(timing.decode, trace)
        metrics.stage_duration.labels(name, "queue").observe(timing.queue, trace)
        metrics.stage_duration.labels(name, "compute").observe(timing.compute, trace)
        metrics.stage_duration.labels(name, "reply").observe(now - answer.started - answer.seconds, trace)
        metrics.deadline_slack.labels(name).observe(timing.slack, trace)
        metrics.merge_r.labels(name).observe(answer.r)
        metrics.tokens_input.labels(name).inc(cost.tokens_in)
        metrics.tokens_merged.labels(name).inc(cost.tokens_in - cost.tokens[-1])
        metrics.flops.labels(name).inc(reply.flops)
        metrics.flops_saved.labels(name).inc(max(0, reply.flops_saved))
        if model.relative_quality is not None and answer.r in job.served.rs:
            quality = model.relative_quality[job.served.rs.index(answer.r)]
            metrics.quality_ratio.labels(name).observe(quality)
        return reply

    def _margin(self) -> float:
        """Return what to keep back from a deadline for the way from the device to the caller, in seconds."""
        ranked = sorted(self._ways_back)
        return max(self.reply_margin, ranked[int(REPLIES_IN_TIME * (len(ranked) - 1))])

    def _forget_drift(self, served: Served) -> None:
        """Let an idle device's predictions return to its profile: while all is refused, no batch would correct them."""
        now = _now()
        if self._on_device is None and not self._queued() and self._free_at > -math.inf:
            served.scheduler.latency.idle(now - self._free_at)
            self._free_at = now
            self.metrics.drift.labels(served.model.name).set(served.scheduler.latency.drift)

    def _share(self, served: Served) -> None:
        """Have a model's scheduler reckon with those of the others, and the others with it."""
        self._schedulers.append(served.scheduler)
        served.scheduler.sharing = self._schedulers

    def _all(self) -> Iterator[Served]:
        return chain(self.models.values(), self.leaving)

    def _queued(self) -> int:
        return sum(len(served.scheduler) for served in self._all())

    def _queue_changed(self, served: Served) -> None:
        self.metrics.queue_depth.labels(served.model.name).set(len(served.scheduler))


# What is wrong with the request itself, an image that can't be decoded for one, is no miss; nor is one client's excess.
_MISSED: dict[type[RequestError], str] = {
    InfeasibleError: "infeasible",
    ExpiredError: "expired",
    OverloadedError: "queue_full",
    ModelFailedError: "failed",
    NoMemoryError: "failed",
}


def _top_k(model: HostedModel, request: Request) -> int:
    if request.top_k is None:
        return min(DEFAULT_TOP_K, model.num_classes)
    if request.top_k < 1:
        raise InvalidRequestError("top_k", f"must be at least 1, and is {request.top_k}")
    return min(request.top_k, model.num_classes)


def _prepared(
    preprocess: Preprocess, source: EncodedImage | Pixels | Normalised
) -> NDArray[np.uint8] | NDArray[np.float32]:
    match source:
        case EncodedImage(data):
            return preprocess.encoded(data)
        case Pixels(shape, data):
            return preprocess.pixels(shape, data)
        case Normalised(shape, data):
            return preprocess.normalised(shape, data)


def _drop_decoded(decoding: "Future[Slot]") -> None:
    if not decoding.cancelled() and decoding.exception() is None:
        decoding.result().drop()


def _stopped() -> UnavailableError:
    return UnavailableError("the server has stopped")


def _now() -> float:
    return asyncio.get_running_loop().time()
