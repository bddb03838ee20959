"""Sends a plan's requests at their times, whether or not earlier ones are answered, and records how each ends.

An open loop: no request waits for the answer to another, and each latency counts from the time at which its request
was meant to be sent. The figures thus include all requests that arrive while a server stalls. A loop that waits for
answers would not send them ("coordinated omission"; Schroeder et al., "Open Versus Closed", NSDI 2006).
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_client.channel import DEFAULT_MAX_MESSAGE_BYTES, Metadata, call_metadata, channel_credentials, channel_options
from tome_client.errors import TomeError, error_from_rpc
from tome_client.load.images import Sample
from tome_client.load.plan import LoadPlan, PlannedRequest
from tome_client.requests import PredictOptions, predict_request
from tome_client.results import Merging, ModelInfo, PredictResult, Timing, model_info, predict_result

# A request's number, lag, latency, code, reason and answer. The garbage collector does not track tuples of plain
# values; walking through as many dataclasses would halt a long run for tens of milliseconds.
_Ended: TypeAlias = tuple[int, float, float, str, str | None, bytes]

_Call: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"

_PREDICT = "/tome_api.v1.Inference/Predict"

# Seconds that the server may take to describe its model, before the run.
_CONNECT_TIMEOUT = 20.0

# Seconds between reading the clock and the first request.
_RUN_UP = 0.05

# A call with more seconds than this has no gRPC deadline: gRPC takes a deadline centuries away for one in the past.
_LONGEST_TIMEOUT = 1e9

_PROGRESS_INTERVAL = 0.25


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one request."""

    at: float
    """When it was meant to be sent, in seconds since the start of the measured run."""
    lag: float
    """Seconds between then and when it was sent."""
    latency: float
    """Seconds from `at` to its answer or failure."""
    budget: float
    """Seconds from `at` within which the answer had to come; infinite for a request without a deadline."""
    image: str
    code: str
    """Name of the gRPC status code, "OK" for an answer."""
    reason: str | None = None
    """The server's reason for a failure, such as "INFEASIBLE"; None where it gave none."""
    merging: Merging | None = None
    """How much was merged; None without an answer, like `timing`."""
    timing: Timing | None = None
    """Where the server's time went."""
    right: bool | None = None
    """Whether it was answered with the image's label; None for an image without a label."""

    @property
    def answered(self) -> bool:
        """Whether there was an answer, late or not."""
        return self.code == "OK"

    @property
    def has_deadline(self) -> bool:
        """Whether the request had a finite budget."""
        return math.isfinite(self.budget)

    @property
    def attained(self) -> bool:
        """Whether there was an answer within the budget, or any answer if there was no deadline."""
        return self.answered and self.latency <= self.budget


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    at: float
    """Seconds since the start of the measured run; negative while warming up."""
    duration: float
    """Seconds that the measured run takes."""
    sent: int
    """Requests sent since then."""
    ended: int
    """Those of `sent` that were answered or failed."""
    judged: int
    """Those of `ended` that had a deadline."""
    attained: int
    """Those of `judged` that were answered in time."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A run and the ends of its requests, without those of the warm-up."""

    plan: LoadPlan
    model: ModelInfo
    """The model, as the server described it before the run."""
    outcomes: tuple[Outcome, ...]
    """In order of completion."""
    duration: float
    """Seconds measured: those of the plan, or fewer if the run was stopped."""
    stopped: bool
    """Whether `stop` ended it early. Requests that had no answer by then are left out."""


async def run_load(
    target: str,
    plan: LoadPlan,
    *,
    tls: bool | grpc.ChannelCredentials = False,
    root_certificates: bytes | None = None,
    client_certificate: bytes | None = None,
    client_key: bytes | None = None,
    token: str | Callable[[], str] | None = None,
    metadata: Iterable[tuple[str, str | bytes]] = (),
    health_checks: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Sends the plan's requests to a server and returns how each ended.

    It returns when every request was answered or given up. No request is retried. Run it on the loop that `event_loop`
    returns, whose timers are finer than those of asyncio's own loop.

    Args:
        target: "host:port", or any gRPC target.
        plan: What to send.
        tls: See Client, also for the certificates, `token`, `metadata` and `health_checks`. A function that
            returns a token is called once.
        progress: Called a few times a second.
        stop: Ends the run early when set.

    Raises:
        TomeError: The server did not describe its model before the run, or `stop` was set before it did (CANCELLED).
            Once the run has begun, failures are outcomes.
        ValueError: The model does not have a label; Client would not accept the certificates or the token.
    """
    credentials = channel_credentials(tls, root_certificates, client_certificate, client_key)
    options = channel_options(
        target,
        retries=False,
        health_checks=health_checks,
        max_send_bytes=DEFAULT_MAX_MESSAGE_BYTES,
        max_receive_bytes=DEFAULT_MAX_MESSAGE_BYTES,
    )
    channels = [
        grpc.aio.insecure_channel(target, options)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options)
        for _ in range(plan.connections)
    ]
    try:
        sent_along = call_metadata(metadata, token)()
        model = await _unless(stop, _describe_all(channels, plan, target, sent_along))
        _check_labels(plan.samples, model)
        return await _Run(plan, model, channels, target, sent_along).run(progress, stop)
    finally:
        for channel in channels:
            await channel.close()


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns a new event loop whose timers fire within about 0.1 ms of their time.

    asyncio's own loop waits in whole milliseconds, as epoll does; select waits in microseconds. select takes only file
    descriptors below 1024, which is no limit here: the loop does not hold gRPC's connections.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class _Run:
    """One run: its clock, its calls and their outcomes."""

    def __init__(
        self, plan: LoadPlan, model: ModelInfo, channels: Sequence[grpc.aio.Channel], target: str, metadata: Metadata
    ) -> None:
        self.plan = plan
        self.model = model
        self.target = target
        self.metadata = metadata
        # Calls take and return bytes: messages are made before the run, and answers are read after it.
        self.calls: list[_Call] = [channel.unary_unary(_PREDICT) for channel in channels]
        self.schedule = plan.schedule()
        self.images = [inference_pb2.PredictRequest(image=one.data).SerializeToString() for one in plan.samples]
        self.options = {budget: _options(plan, budget) for budget in {one.budget for one in self.schedule}}
        self.ended: list[_Ended] = []
        self.sent = 0
        self.judged = 0
        self.attained = 0
        self.start = 0.0

    async def run(self, progress: Callable[[Progress], None] | None, stop: asyncio.Event | None) -> LoadResult:
        self.start = time.perf_counter() + _RUN_UP + self.plan.warmup
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task((stop or asyncio.Event()).wait())
        reporting = asyncio.create_task(self._report(progress)) if progress else None
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopped = not sending.done()
            elapsed = time.perf_counter() - self.start
            if not stopped:
                sending.result()
        finally:
            # The calls of `sending` end with it.
            ending = [task for task in (sending, stopping, reporting) if task and not task.done()]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
        duration = max(0.0, min(elapsed, self.plan.duration)) if stopped else self.plan.duration
        return LoadResult(self.plan, self.model, tuple(map(self._outcome, self.ended)), duration, stopped)

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as in_flight:
            for number, request in enumerate(self.schedule):
                # For an overdue request too: meanwhile answers must be read.
                await asyncio.sleep(max(0.0, self.start + request.at - time.perf_counter()))
                in_flight.create_task(self._send(number, request, self.calls[number % len(self.calls)]))

    async def _send(self, number: int, request: PlannedRequest, call: _Call) -> None:
        due = self.start + request.at
        lag = time.perf_counter() - due
        measured = request.at >= 0
        self.sent += measured
        allowed = request.budget + (0.0 if self.plan.deadline_only else self.plan.grace) - lag
        # In protobuf's encoding, concatenated messages are one message. So each image is held once, not once a budget.
        message = self.options[request.budget] + self.images[request.sample]
        code, reason, answer = "OK", None, b""
        try:
            timeout = max(0.0, allowed) if allowed < _LONGEST_TIMEOUT else None
            answer = await call(message, timeout=timeout, metadata=self.metadata)
            latency = time.perf_counter() - due
        except grpc.RpcError as failure:
            latency = time.perf_counter() - due
            error = error_from_rpc(failure, self.target)
            code, reason = error.code.name, error.reason
        if measured:
            self.ended.append((number, lag, latency, code, reason, answer))
            if math.isfinite(request.budget):
                self.judged += 1
                self.attained += code == "OK" and latency <= request.budget

    def _outcome(self, ended: _Ended) -> Outcome:
        number, lag, latency, code, reason, answer = ended
        request = self.schedule[number]
        sample = self.plan.samples[request.sample]
        result = predict_result(inference_pb2.PredictResponse.FromString(answer)) if code == "OK" else None
        return Outcome(
            at=request.at,
            lag=lag,
            latency=latency,
            budget=request.budget,
            image=sample.name,
            code=code,
            reason=reason,
            merging=result.merging if result else None,
            timing=result.timing if result else None,
            right=None if sample.label is None else result is not None and _is(sample.label, result),
        )

    async def _report(self, progress: Callable[[Progress], None]) -> None:
        while True:
            at = time.perf_counter() - self.start
            progress(Progress(at, self.plan.duration, self.sent, len(self.ended), self.judged, self.attained))
            await asyncio.sleep(_PROGRESS_INTERVAL)


async def _unless(stop: asyncio.Event | None, describing: Coroutine[None, None, ModelInfo]) -> ModelInfo:
    """Awaits the model's description, which takes long if no server is there; ends early if `stop` is set."""
    described = asyncio.create_task(describing)
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({described, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not described.done():
            raise TomeError(grpc.StatusCode.CANCELLED, "stopped before the run began")
        return described.result()
    finally:
        for task in (described, stopping):
            task.cancel()
        await asyncio.gather(described, stopping, return_exceptions=True)


async def _describe_all(
    channels: Sequence[grpc.aio.Channel], plan: LoadPlan, target: str, metadata: Metadata
) -> ModelInfo:
    model, *_ = await asyncio.gather(*(_describe(channel, plan, target, metadata) for channel in channels))
    return model


async def _describe(channel: grpc.aio.Channel, plan: LoadPlan, target: str, metadata: Metadata) -> ModelInfo:
    """Has the server describe the model. This also connects, so that the first request need not wait for that."""
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GetModelRequest(model=plan.options.get("model", ""))
    try:
        return model_info(await stub.GetModel(request, timeout=_CONNECT_TIMEOUT, metadata=metadata))
    except grpc.RpcError as error:
        raise error_from_rpc(error, target) from error


def _options(plan: LoadPlan, budget: float) -> bytes:
    """Returns the message of a request with that budget, without its image."""
    options = PredictOptions(**{**plan.options, "budget": budget, "top_k": 1})
    if plan.deadline_only:
        del options["budget"]
    options["features"] = options["patch_features"] = options["token_map"] = False
    request = predict_request(b"", options)
    request.ClearField("image")
    return request.SerializeToString()


def _is(label: str, result: PredictResult) -> bool:
    return any(label in (best.label, str(best.class_id)) for best in result.predictions[:1])


def _check_labels(samples: Sequence[Sample], model: ModelInfo) -> None:
    known = {*model.labels, *map(str, range(model.num_classes))}
    for one in samples:
        if one.label is not None and one.label not in known:
            raise ValueError(
                f"{one.name} is labelled {one.label!r}, which is neither the name nor the index of one of the "
                f"{model.num_classes} classes of {model.summary.name}"
            )
