"""The life of a request between the wire and the device: admit, decode, queue, batch, answer.

Asyncio throughout; images are decoded in a pool of threads and batches run in the executor's thread, so that nothing
blocks the event loop.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from tome_server.errors import (
    ExpiredError,
    InvalidRequestError,
    ModelFailedError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.merging import MacCount
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import Preprocess
from tome_server.observability.metrics import Metrics
from tome_server.runtime.executor import Executor, Result, Work
from tome_server.scheduling.queue import DeadlineQueue, Limits

log = logging.getLogger(__name__)

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
    deadline: float = math.inf
    r: int | None = None
    min_r: int | None = None
    max_r: int | None = None
    top_k: int | None = None
    features: bool = False
    token_map: bool = False


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds."""

    decode: float
    queue: float
    compute: float
    total: float
    slack: float | None
    """Deadline less the time of the answer; None without a deadline."""
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

    model: HostedModel
    r: int
    work: Work
    answer: "asyncio.Future[_Answer]"
    queued: float
    """when it entered the queue"""
    taken: bool = False
    """whether it left the queue for the device"""


@dataclass(frozen=True)
class _Answer:
    """A job's share of its batch."""

    result: Result
    started: float
    """when the batch started"""
    seconds: float
    """what the whole batch took"""
    batch_size: int


@dataclass
class Engine:
    """Answers requests for the hosted models with one device. `run` must be running while `predict` is called."""

    executor: Executor
    metrics: Metrics
    batching: Limits
    max_pending: int
    """Requests held at once; one more is refused."""
    decode_threads: int
    names: Sequence[str]
    """Of all models that will be hosted; those not in `models` are loading still."""
    models: dict[str, HostedModel] = field(default_factory=dict)
    draining: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once new requests are refused because the server is stopping."""
    _pending: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._queue: DeadlineQueue[_Job] = DeadlineQueue(self.batching)
        self._arrived = asyncio.Event()
        self._decoders = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")

    def model(self, name: str) -> HostedModel:
        """Return a hosted model, the first if unnamed. Raises UnknownModelError, or UnavailableError if loading."""
        name = name or self.names[0]
        if name not in self.names:
            # The caller's text goes into the status, and gRPC drops statuses of more than a few kilobytes.
            raise UnknownModelError(name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}…", self.names)
        if name not in self.models:
            raise UnavailableError(f"model {name} is loading")
        return self.models[name]

    async def predict(self, request: Request) -> Reply:
        """Answer one request. Raises a RequestError that says why it could not be answered.

        When the caller is cancelled, the request leaves the queue; a batch already on the device runs to its end.
        """
        if self.draining.is_set():
            raise UnavailableError("the server is shutting down")
        model = self.model(request.model)
        r = choose_r(model, request)
        top_k = _top_k(model, request)
        if self._pending >= self.max_pending:
            raise OverloadedError(self._pending, RETRY_AFTER)
        self._pending += 1
        self.metrics.pending.set(self._pending)
        job = None
        try:
            async with asyncio.timeout_at(None if math.isinf(request.deadline) else request.deadline):
                image = await self._decode(model, request)
                work = Work(image, top_k, request.features, request.token_map)
                job = _Job(model, r, work, asyncio.get_running_loop().create_future(), _now())
                answer = await self._wait(job, request)
        except TimeoutError:
            stage = "decode" if job is None else "compute" if job.taken else "queue"
            # A budget less than the reply margin is over before it begins.
            raise ExpiredError(stage, max(0.0, request.deadline - request.arrival)) from None
        finally:
            self._pending -= 1
            self.metrics.pending.set(self._pending)
        return self._reply(job, answer, request)

    async def run(self) -> None:
        """Run batches until cancelled."""
        while True:
            await self._run_batch(await self._next_batch())

    def drain(self) -> None:
        """Refuse new requests from now on; those already here are answered."""
        self.draining.set()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._decoders.shutdown(cancel_futures=True)
        self.executor.close()

    async def _decode(self, model: HostedModel, request: Request) -> Tensor:
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, _prepare, model.preprocess, request.input
        )

    async def _wait(self, job: _Job, request: Request) -> _Answer:
        ticket = self._queue.push(job, group=(job.model.name, job.r), arrival=job.queued, deadline=request.deadline)
        self._queue_changed()
        self._arrived.set()
        try:
            return await job.answer
        finally:
            if self._queue.cancel(ticket):
                self._queue_changed()

    async def _next_batch(self) -> list[_Job]:
        while True:
            now = _now()
            start = self._queue.ready_at()
            if start is not None and start <= now:
                batch = self._queue.take(now)
                self._queue_changed()
                if batch:
                    return batch
                continue
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(start):
                    await self._arrived.wait()
            except TimeoutError:
                pass  # the batch has waited long enough for mates

    async def _run_batch(self, batch: list[_Job]) -> None:
        """Run a batch of one model and r; if it fails, run its members alone, so that only the culprit fails."""
        model, r = batch[0].model, batch[0].r
        for job in batch:
            job.taken = True
        started = _now()
        try:
            done = await self.executor.run(model, [job.work for job in batch], r)
        except Exception:
            if len(batch) > 1:
                log.exception("model %s failed on a batch of %d; running its images alone", model.name, len(batch))
                for job in batch:
                    if not job.answer.done():  # its caller may have gone
                        await self._run_batch([job])
                return
            log.exception("model %s failed", model.name)
            if not batch[0].answer.done():
                batch[0].answer.set_exception(ModelFailedError(f"model {model.name} failed on this input"))
            return
        self.metrics.batch_size.labels(model.name).observe(len(batch))
        for job, result in zip(batch, done.results, strict=True):
            if not job.answer.done():
                job.answer.set_result(_Answer(result, started, done.seconds, len(batch)))

    def _reply(self, job: _Job, answer: _Answer, request: Request) -> Reply:
        now = _now()
        name, cost = job.model.name, job.model.cost(job.r)
        timing = Timing(
            decode=job.queued - request.arrival,
            queue=answer.started - job.queued,
            compute=answer.seconds,
            total=now - request.arrival,
            slack=None if math.isinf(request.deadline) else request.deadline - now,
            batch_size=answer.batch_size,
        )
        reply = Reply(job.model, answer.result, job.r, cost, timing)
        metrics = self.metrics
        metrics.request_duration.labels(name).observe(timing.total)
        metrics.stage_duration.labels(name, "decode").observe(timing.decode)
        metrics.stage_duration.labels(name, "queue").observe(timing.queue)
        metrics.stage_duration.labels(name, "compute").observe(timing.compute)
        metrics.merge_r.labels(name).observe(job.r)
        metrics.tokens_input.labels(name).inc(cost.tokens_in)
        metrics.tokens_merged.labels(name).inc(cost.tokens_in - cost.tokens[-1])
        metrics.flops.labels(name).inc(reply.flops)
        metrics.flops_saved.labels(name).inc(max(0, reply.flops_saved))
        return reply

    def _queue_changed(self) -> None:
        self.metrics.queue_depth.set(len(self._queue))


def choose_r(model: HostedModel, request: Request) -> int:
    """Return the r to run `request` at: its own, else the model's default within its bounds.

    Raises InvalidRequestError if a bound is out of range or they contradict each other.
    """
    for name, value in (("r", request.r), ("min_r", request.min_r), ("max_r", request.max_r)):
        if value is not None and not 0 <= value <= model.largest_r:
            raise InvalidRequestError(name, f"must lie in 0..{model.largest_r} for model {model.name}, and is {value}")
    low = 0 if request.min_r is None else request.min_r
    high = model.largest_r if request.max_r is None else request.max_r
    if low > high:
        raise InvalidRequestError("min_r", f"is {low}, more than max_r, which is {high}")
    if request.r is None:
        return min(max(model.default_r, low), high)
    if not low <= request.r <= high:
        raise InvalidRequestError("r", f"is {request.r}, outside of min_r..max_r, which is {low}..{high}")
    return request.r


def _top_k(model: HostedModel, request: Request) -> int:
    if request.top_k is None:
        return min(DEFAULT_TOP_K, model.num_classes)
    if request.top_k < 1:
        raise InvalidRequestError("top_k", f"must be at least 1, and is {request.top_k}")
    return min(request.top_k, model.num_classes)


def _prepare(preprocess: Preprocess, source: EncodedImage | Pixels | Normalised) -> Tensor:
    match source:
        case EncodedImage(data):
            return preprocess.encoded(data)
        case Pixels(shape, data):
            return preprocess.pixels(shape, data)
        case Normalised(shape, data):
            return preprocess.normalised(shape, data)


def _now() -> float:
    return asyncio.get_running_loop().time()
