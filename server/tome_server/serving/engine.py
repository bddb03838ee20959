"""The life of a request between the wire and the device: it is admitted, decoded, batched and answered.

Asyncio throughout; images are decoded in threads (see `decode_queue`) and batches (see `batcher`) run in the device's
process, so that nothing blocks the event loop.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from functools import partial

from tome_server.device.client import Device
from tome_server.device.shared_images import Slot
from tome_server.errors import (
    ClientLimitError,
    ExpiredError,
    InfeasibleError,
    InvalidRequestError,
    ModelFailedError,
    NoMemoryError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from tome_server.models.preprocess import InputSize
from tome_server.observability import request_context
from tome_server.observability.metrics import Metrics, Missed, Rejected, Stage, exemplar
from tome_server.observability.request_outcome import Observer, RequestOutcome, Timing, Trace, Tracer
from tome_server.scheduling.queue import Waiting
from tome_server.serving.batcher import BatchedResult, Batcher, Job, OnDevice, Served
from tome_server.serving.client_limit import ClientLimit
from tome_server.serving.decode_queue import Decode, Decoders, HopelessError
from tome_server.serving.overhead import DecodeTimes, Margin
from tome_server.serving.registry import ModelRegistry
from tome_server.serving.requests import ImageInput, Reply, Request
from tome_server.serving.served import Bounds

# Seconds after which a refused client may retry: about what a few batches take.
RETRY_AFTER = 0.1


@dataclass
class Engine:
    """Answers requests for the models in service with one device. `run` must be running while `predict` is called."""

    device: Device
    metrics: Metrics
    max_delay: float
    """Seconds that requests may wait for batch-mates while the device is idle, unless their model says otherwise."""
    max_pending: int
    """Requests in the server at once; one more is refused. A model may allow itself fewer."""
    reply_margin: float
    """Seconds that are at least kept back from each deadline for the reply; more where replies were slower."""
    decode_threads: int
    """Images decoded at once."""
    names: InitVar[Sequence[str]]
    """Of the models that will be served, the one for requests that name none first."""
    decode_memory: int = 512 * 2**20
    """Bytes that decoding may take at once; a single image that needs more is decoded alone."""
    max_client_requests: int | None = None
    """Requests of one client in the server at once; one more is refused."""
    observers: Sequence[Observer] = ()
    """Called at each request's end."""
    tracer: Tracer | None = None
    """Begins a trace for each request. Exemplars then name that trace, and not only one that the caller began."""
    registry: ModelRegistry = field(init=False)
    """The models in service."""
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once new requests are refused because the server is stopping."""
    hung: bool = field(default=False, init=False)
    """Whether new requests are refused because the device hangs: see `watchdog`."""

    def __post_init__(self, names: Sequence[str]) -> None:
        self._margin = Margin(self.reply_margin)
        self._decoders = Decoders(self.decode_threads, self.decode_memory, DecodeTimes())
        self._batcher = Batcher(self.device, self.metrics, self.max_delay, self._margin)
        self.registry = ModelRegistry(self._batcher, names)
        self._client_limit = ClientLimit(self.max_client_requests, RETRY_AFTER)
        self._pending = 0
        self._last_left = -math.inf
        self.metrics.pending_limit.set(self.max_pending)
        self.metrics.device_hung.set(0)
        self.metrics.decode_queue_depth.set_function(lambda: len(self._decoders))

    @property
    def on_device(self) -> OnDevice | None:
        """The batch that runs on the device, if any."""
        return self._batcher.on_device

    def set_hung(self, hung: bool) -> None:
        """Refuse new requests because the device hangs, or accept them again."""
        self.hung = hung
        self.metrics.device_hung.set(hung)

    @property
    def idle_since(self) -> float:
        """When the last request left the server; infinite while one is there."""
        return math.inf if self._pending else self._last_left

    def max_pending_of(self, served: Served) -> int:
        """Return how many requests for a model may be in the server at once."""
        own = served.overrides.batching.max_pending
        return self.max_pending if own is None else min(own, self.max_pending)

    def max_delay_of(self, served: Served) -> float:
        """Return how many seconds a model's requests may wait for batch-mates while the device is idle."""
        return self._batcher.max_delay_of(served)

    async def run(self) -> None:
        """Run batches until cancelled. Raises DeviceDiedError if there is no device any more.

        However it ends, every request without an answer then fails with UnavailableError.
        """
        await self._batcher.run()

    def drain(self) -> None:
        """Refuse new requests from now on; those already here are answered."""
        self.draining.set()

    async def drained(self) -> None:
        """Wait until every request that was admitted has been answered."""
        await self.registry.unheld()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._decoders.close()

    async def predict(self, request: Request, served: Served | None = None) -> Reply:
        """Answer one request, with the model `served` if the caller holds one. Raises a RequestError that says why not.

        When the caller is cancelled, the request leaves the queue; a batch already on the device runs to its end.
        """
        trace = self.tracer(_now() - request.arrival) if self.tracer else None
        trace_id = trace.id if trace else _callers_trace()
        try:
            reply = await self._predict(request, served, trace_id)
        except BaseException as error:
            self._notify(request, trace, error)
            raise
        self._notify(request, trace, reply)
        return reply

    async def _predict(self, request: Request, served: Served | None, trace_id: str | None) -> Reply:
        """Resolve what the request names, answer it, and count how that went."""
        if self.draining.is_set():
            raise UnavailableError("the server is shutting down")
        if self.hung:
            raise UnavailableError("the device hangs; another replica may answer")
        served = served or self.registry.model(request.model)
        bounds = served.bounds(request.r, request.min_r, request.max_r, request.min_quality)
        if request.outputs.top_k < 1:
            raise InvalidRequestError("top_k", f"must be at least 1, and is {request.outputs.top_k}")
        deadline = request.arrival + served.default_budget if request.deadline is None else request.deadline
        try:
            with self.registry.holding(served), self._client_limit.hold(), self._pending_place(served):
                reply = await self._answer(request, served, bounds, deadline)
        except BaseException as error:
            self._count_failure(served, error, deadline, trace_id)
            raise
        self._count_reply(served, reply, trace_id)
        return reply

    async def _answer(self, request: Request, served: Served, bounds: Bounds, deadline: float) -> Reply:
        """Admit a request, have its image decoded, and have it batched."""
        size = request.input.size(served.model.preprocess)
        job = Job(served, request.outputs, bounds.exact, partial(self._decoded_at, size))
        # As the scheduler sees it: the budget must allow for the margin as well.
        margin = self._margin.at(_now())
        waiting = Waiting(job, request.arrival - margin, deadline - margin, bounds.low, bounds.high)
        served.scheduler.arrived(request.arrival, deadline - request.arrival)
        # Before decoding: what can't be met is refused before it costs anything.
        self._batcher.check(waiting)
        slot = None
        try:
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline - self.reply_margin):
                job.slot = slot = await self._decode(waiting, request.input, size)
                self.device.prefetch(served.key, slot)
                result = await self._batcher.submit(waiting)
        except TimeoutError:
            raise ExpiredError(job.stage, deadline - request.arrival) from None
        finally:
            # Once a job is taken, its batch drops the slot.
            if slot is not None and job.stage is not Stage.COMPUTE:
                slot.drop()
        return self._reply(job, result, request.arrival, deadline)

    @contextmanager
    def _pending_place(self, served: Served) -> Iterator[None]:
        """Count a request in the server. Raises OverloadedError if the server or the model has too many."""
        for pending, limit in ((self._pending, self.max_pending), (served.pending, self.max_pending_of(served))):
            if pending >= limit:
                raise OverloadedError(pending, RETRY_AFTER)
        self._pending += 1
        served.pending += 1
        self.metrics.pending.set(self._pending)
        try:
            yield
        finally:
            self._pending -= 1
            served.pending -= 1
            self._last_left = _now()
            self.metrics.pending.set(self._pending)

    def _decoded_at(self, size: InputSize, deadline: float) -> float:
        """Return when an image of that size would be decoded if it came now with this deadline."""
        now = _now()
        seconds = self._decoders.times.seconds(now, size.kind, size.megapixels)
        return self._decoders.done_at(now, deadline, seconds)

    async def _decode(self, waiting: Waiting[Job], source: ImageInput, size: InputSize) -> Slot:
        """Prepare an image where the device finds it.

        Raises InfeasibleError if it can't be begun soon enough, because earlier images took longer than expected.
        """
        served = waiting.item.served
        alone = served.scheduler.latency.promised(1, waiting.high)
        decode = Decode(
            work=partial(self._prepare, served, source),
            discard=lambda slot: slot.drop(),
            size=size,
            deadline=waiting.deadline,
            due=waiting.deadline - alone,
        )
        served.scheduler.expect(waiting)
        try:
            return await self._decoders.run(decode)
        except HopelessError:
            raise self._batcher.infeasible(waiting) from None
        finally:
            served.scheduler.forget(waiting)

    def _prepare(self, served: Served, source: ImageInput) -> Slot:
        """Decode an image, in a thread."""
        return self.device.put(served.key, source.prepare(served.model.preprocess))

    def _reply(self, job: Job, result: BatchedResult, arrival: float, deadline: float) -> Reply:
        now, model = _now(), job.served.model
        self._margin.add(now, now - result.started - result.seconds)
        timing = Timing(
            decode=job.queued - arrival,
            queue=result.started - job.queued,
            compute=result.seconds,
            predicted=result.predicted,
            total=now - arrival,
            slack=None if math.isinf(deadline) else deadline - now,
            batch_size=result.batch_size,
        )
        return Reply(model, result.result, result.r, model.cost(result.r), timing)

    def _count_failure(self, served: Served, error: BaseException, deadline: float, trace_id: str | None) -> None:
        metrics = self.metrics.of_model(served.model.name)
        if rejected := _REJECTED.get(type(error)):
            metrics.rejected[rejected].inc()
        if isinstance(error, asyncio.CancelledError):
            # gRPC ends calls at their deadline, which on a busy machine may be before we get to it.
            missed = Missed.EXPIRED if _now() >= deadline - self.reply_margin else None
        elif isinstance(error, RequestError):
            missed = _MISSED.get(type(error))
        else:
            missed = Missed.FAILED if isinstance(error, Exception) else None
        if missed:
            metrics.slo_missed[missed].inc(exemplar=exemplar(trace_id))

    def _count_reply(self, served: Served, reply: Reply, trace_id: str | None) -> None:
        metrics, trace = self.metrics.of_model(served.model.name), exemplar(trace_id)
        timing, cost = reply.timing, reply.cost
        metrics.request_duration.observe(timing.total, trace)
        metrics.stage_duration[Stage.DECODE].observe(timing.decode, trace)
        metrics.stage_duration[Stage.QUEUE].observe(timing.queue, trace)
        metrics.stage_duration[Stage.COMPUTE].observe(timing.compute, trace)
        metrics.stage_duration[Stage.REPLY].observe(timing.reply, trace)
        if timing.slack is not None:
            metrics.deadline_slack.observe(timing.slack, trace)
            if timing.slack >= 0:
                metrics.slo_met.inc()
            else:
                metrics.slo_missed[Missed.LATE].inc(exemplar=trace)
        metrics.merge_r.observe(reply.r)
        metrics.tokens_input.inc(cost.tokens_in)
        metrics.tokens_merged.inc(cost.tokens_in - cost.tokens[-1])
        metrics.flops.inc(reply.flops)
        metrics.flops_saved.inc(max(0, reply.flops_saved))
        quality = served.model.relative_quality
        if quality is not None and reply.r in served.rs:
            metrics.quality_ratio.observe(quality[served.rs.index(reply.r)])

    def _notify(self, request: Request, trace: Trace | None, end: Reply | BaseException) -> None:
        """Tell the observers, and the trace, how a request ended."""
        outcome = RequestOutcome(
            model=request.model or self.registry.default_name,
            seconds=_now() - request.arrival,
            reply=end if isinstance(end, Reply) else None,
            error=None if isinstance(end, Reply) else end,
            budget=self._budget(request),
        )
        for observer in self.observers:
            observer(outcome)
        if trace:
            trace.end(outcome)

    def _budget(self, request: Request) -> float | None:
        if request.deadline is not None:
            return request.deadline - request.arrival
        served = self.registry.models.get(request.model or self.registry.default_name)
        return served.default_budget if served else None


_REJECTED: dict[type[BaseException], Rejected] = {
    InfeasibleError: Rejected.INFEASIBLE,
    OverloadedError: Rejected.QUEUE_FULL,
    ClientLimitError: Rejected.CLIENT_LIMIT,
}
# The caller's own mistakes (an undecodable image, too many requests) don't count as missed deadlines.
_MISSED: dict[type[RequestError], Missed] = {
    InfeasibleError: Missed.INFEASIBLE,
    ExpiredError: Missed.EXPIRED,
    OverloadedError: Missed.QUEUE_FULL,
    ModelFailedError: Missed.FAILED,
    NoMemoryError: Missed.FAILED,
}


def _callers_trace() -> str | None:
    """Return the id of the caller's trace, if the caller records it."""
    trace = request_context.trace.get()
    return trace.recorded_id if trace else None


def _now() -> float:
    return asyncio.get_running_loop().time()
