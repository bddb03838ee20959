"""The life of a request between the wire and the device: admit, decode, have it batched, reply.

Asyncio throughout; images are decoded in threads (see `decode_queue`) and batches (see `batcher`) run in the device's
process, so that nothing blocks the event loop.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

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
    UnknownModelError,
)
from tome_server.execution.batch import BatchItem, ItemResult
from tome_server.mac_count import MacCount
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import InputSize, Preprocess
from tome_server.observability.ended import Answered, Observer, RequestOutcome, Trace, Tracer
from tome_server.observability.metrics import Metrics, exemplar
from tome_server.observability.request_context import Shares
from tome_server.scheduling.queue import Waiting
from tome_server.serving.batcher import Answer, Batcher, Job, Served
from tome_server.serving.decode_queue import Decode, Decoders, HopelessError
from tome_server.serving.overhead import DecodeTimes, Margin
from tome_server.serving.served import Bounds

FLOPS_PER_MAC = 2
# What a refused client is told to wait: about the time that a few batches take.
RETRY_AFTER = 0.1
DEFAULT_TOP_K = 5
# Characters of an unknown model's name that its refusal repeats.
NAME_SHOWN = 100


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
    deadline: float | None = None
    """None for the model's default budget; infinite for a request that may wait for any time."""
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


def deadline_of(arrival: float, budget: float | None, time_remaining: float | None) -> float | None:
    """Return a request's deadline: `arrival` plus the lesser of its budget and the call's own time limit, in seconds.

    `budget` is None where the request names none, infinite where it says that it has no deadline. Returns None for the
    model's default budget, infinity for no deadline.
    """
    limits = [seconds for seconds in (budget, time_remaining) if seconds is not None]
    return arrival + min(limits) if limits else None


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds."""

    decode: float
    queue: float
    compute: float
    predicted: float
    """what the batch was expected to take"""
    total: float
    slack: float | None
    """Deadline less the time of the answer; None without a deadline."""
    batch_size: int


@dataclass(frozen=True)
class Reply:
    """A prediction and what was done for it."""

    model: HostedModel
    result: ItemResult
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
    """Images decoded at once."""
    names: list[str] = field(default_factory=list)
    """Of all models that are or will be served, the one for requests that name none first."""
    models: dict[str, Served] = field(default_factory=dict)
    """Those that are loaded, by name."""
    decode_memory: int = 512 * 2**20
    """Bytes that decoding may take at once; a single image that needs more is decoded alone."""
    max_client_requests: int | None = None
    """Requests held at once for one client; one more is refused."""
    observers: Sequence[Observer] = ()
    """Told of each request's end."""
    tracer: Tracer | None = None
    """Makes traces of requests; metrics then name these as exemplars, those begun here too."""
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once new requests are refused because the server is stopping."""

    def __post_init__(self) -> None:
        self._margin = Margin(self.reply_margin)
        self._decoders = Decoders(self.decode_threads, self.decode_memory, DecodeTimes())
        self._batcher = Batcher(self.device, self.metrics, self.max_delay, self._margin)
        for served in self.models.values():
            self._batcher.add(served)
        self._shares = Shares(self.max_client_requests, RETRY_AFTER)
        self.leaving: list[Served] = []
        """Models that have been replaced or retired, and still have requests to answer."""
        # Requests in the engine: all, and by the model's key.
        self._pending = 0
        self._held: Counter[str] = Counter()
        self._released = asyncio.Event()
        self._last_left = -math.inf
        self.metrics.pending_limit.set(self.max_pending)
        self.metrics.decode_queue_depth.set_function(lambda: len(self._decoders))

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
    def idle_since(self) -> float:
        """When the last request left the server; infinite while one is there."""
        return math.inf if self._pending else self._last_left

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
        self._batcher.add(served)
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
        return self._batcher.longest_delay(served)

    async def left(self, served: Served) -> None:
        """Wait until a model that was replaced or retired has answered the requests that it still had."""
        while self._held[served.key]:
            self._released.clear()
            await self._released.wait()
        await self._batcher.remove(served)
        self.leaving.remove(served)

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
        await self._batcher.run()

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
        self._decoders.close()

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
        model = request.model or self.default_name
        ended = RequestOutcome(model, _now() - request.arrival, answer, error, self._budget(request))
        for observer in self.observers:
            observer(ended)
        if trace:
            trace.end(ended)

    def _budget(self, request: Request) -> float | None:
        if request.deadline is not None:
            return request.deadline - request.arrival
        served = self.models.get(request.model or self.default_name)
        return served.default_budget if served else None

    async def _predict(self, request: Request, served: Served | None) -> Reply:
        if self.draining.is_set():
            raise UnavailableError("the server is shutting down")
        served = served or self.model(request.model)
        bounds = served.bounds(request.r, request.min_r, request.max_r, request.min_quality)
        top_k = _top_k(served.model, request)
        deadline = request.arrival + served.default_budget if request.deadline is None else request.deadline
        try:
            with self.holding(served), self._shares.hold():
                reply = await self._answer(served, bounds, top_k, request, deadline)
        except ClientLimitError:
            self.metrics.rejected.labels(served.model.name, "client_limit").inc()
            raise
        except asyncio.CancelledError:
            # gRPC ends calls at their deadline, which on a busy machine may be before we get to it.
            if _now() >= deadline - self.reply_margin:
                self.metrics.slo_missed.labels(served.model.name, "expired").inc(exemplar=exemplar(request.trace_id))
            raise
        except Exception as error:
            if missed := _MISSED.get(type(error)) if isinstance(error, RequestError) else "failed":
                self.metrics.slo_missed.labels(served.model.name, missed).inc(exemplar=exemplar(request.trace_id))
            raise
        if reply.timing.slack is None:
            pass  # no deadline, and so none that was met
        elif reply.timing.slack >= 0:
            self.metrics.slo_met.labels(served.model.name).inc()
        else:
            self.metrics.slo_missed.labels(served.model.name, "late").inc(exemplar=exemplar(request.trace_id))
        return reply

    async def _answer(self, served: Served, bounds: Bounds, top_k: int, request: Request, deadline: float) -> Reply:
        name = served.model.name
        for held, most in ((self._pending, self.max_pending), (served.pending, self.most_pending(served))):
            if held >= most:
                self.metrics.rejected.labels(name, "queue_full").inc()
                raise OverloadedError(held, RETRY_AFTER)
        self._pending += 1
        served.pending += 1
        self.metrics.pending.set(self._pending)
        job = slot = None
        try:
            size = _size(served.model.preprocess, request.input)
            margin = self._margin.at(_now())
            # As the scheduler sees it: the budget must allow for the margin as well.
            limits = (request.arrival - margin, deadline - margin, bounds.low, bounds.high)
            served.scheduler.arrived(request.arrival, deadline - request.arrival)
            ready = partial(self._decoded_at, size)
            # Before decoding: what can't be met is refused before it costs anything.
            self._batcher.check(served, Waiting(None, *limits), ready)
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline - self.reply_margin):
                slot = await self._decode(served, request.input, size, Waiting(None, *limits), ready)
                self.device.prefetch(served.key, slot)
                work = BatchItem(slot, top_k, request.features, request.token_map, request.logits, request.patches)
                answered = asyncio.get_running_loop().create_future()
                job = Job(served, bounds.exact, work, answered, _now(), ready)
                answer = await self._batcher.answer(Waiting(job, *limits))
        except TimeoutError:
            stage = "decode" if job is None else "compute" if job.taken else "queue"
            raise ExpiredError(stage, deadline - request.arrival) from None
        except InfeasibleError:
            self.metrics.rejected.labels(name, "infeasible").inc()
            raise
        finally:
            self._pending -= 1
            served.pending -= 1
            self._last_left = _now()
            self.metrics.pending.set(self._pending)
            if slot is not None and not (job and job.taken):
                slot.drop()
        return self._reply(job, answer, request, deadline)

    def _decoded_at(self, size: InputSize, deadline: float) -> float:
        """Return when an image of that size would be decoded if it came now with this deadline."""
        now = _now()
        seconds = self._decoders.times.seconds(now, size.kind, size.megapixels)
        return self._decoders.done_at(now, deadline, seconds)

    async def _decode(
        self,
        served: Served,
        source: EncodedImage | Pixels | Normalised,
        size: InputSize,
        waiting: Waiting[None],
        ready: Callable[[float], float],
    ) -> Slot:
        """Prepare an image where the device finds it.

        Raises InfeasibleError if it can't be begun soon enough: those that came before took longer than expected.
        """
        alone = served.scheduler.latency.promised(1, waiting.high)
        decode = Decode(
            work=partial(self._prepare, served, source),
            discard=lambda slot: slot.drop(),
            kind=size.kind,
            megapixels=size.megapixels,
            memory=size.decode_bytes,
            deadline=waiting.deadline,
            due=waiting.deadline - alone,
        )
        served.scheduler.expect(waiting)
        try:
            return await self._decoders.run(decode)
        except HopelessError:
            now = _now()
            earliest = self._batcher.earliest(served, waiting.high, ready)
            raise InfeasibleError(earliest - now + self._margin.at(now)) from None
        finally:
            served.scheduler.forget(waiting)

    def _prepare(self, served: Served, source: EncodedImage | Pixels | Normalised) -> Slot:
        return self.device.put(served.key, _prepared(served.model.preprocess, source))

    def _reply(self, job: Job, answer: Answer, request: Request, deadline: float) -> Reply:
        now = _now()
        model = job.served.model
        name, cost = model.name, model.cost(answer.r)
        timing = Timing(
            decode=job.queued - request.arrival,
            queue=answer.started - job.queued,
            compute=answer.seconds,
            predicted=answer.predicted,
            total=now - request.arrival,
            slack=None if math.isinf(deadline) else deadline - now,
            batch_size=answer.batch_size,
        )
        way_back = now - answer.started - answer.seconds
        self._margin.add(now, way_back)
        reply = Reply(model, answer.result, answer.r, cost, timing)
        metrics, trace = self.metrics, exemplar(request.trace_id)
        metrics.request_duration.labels(name).observe(timing.total, trace)
        metrics.stage_duration.labels(name, "decode").observe(timing.decode, trace)
        metrics.stage_duration.labels(name, "queue").observe(timing.queue, trace)
        metrics.stage_duration.labels(name, "compute").observe(timing.compute, trace)
        metrics.stage_duration.labels(name, "reply").observe(way_back, trace)
        if timing.slack is not None:
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


def _size(preprocess: Preprocess, source: EncodedImage | Pixels | Normalised) -> InputSize:
    """Return what preparing an input takes. Raises InvalidRequestError for what is refused before it is decoded."""
    match source:
        case EncodedImage(data):
            return preprocess.encoded_size(data)
        case Pixels(shape, data):
            return preprocess.pixels_size(shape, data)
        case Normalised(shape, data):
            return preprocess.normalised_size(shape, data)


def _now() -> float:
    return asyncio.get_running_loop().time()
