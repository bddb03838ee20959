"""Sends requests at their times, whether or not earlier ones are answered, and records how each ends.

An open loop: no request waits for the answer to another, and each latency counts from the time at which its request
was meant to be sent. The figures thus include all requests that arrive while a server stalls. A loop that waits for
answers would not send them ("coordinated omission"; Schroeder et al., "Open Versus Closed", NSDI 2006).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc

from tome_client.channel import DEFAULT_MAX_MESSAGE_BYTES, Metadata, channel_credentials, channel_options
from tome_client.errors import TomeError, error_from_rpc
from tome_client.load.native import describe_native
from tome_client.load.open_inference import describe_open_inference
from tome_client.load.outcome import LoadResult, Outcome, Progress
from tome_client.load.plan import LoadPlan, PlannedRequest
from tome_client.load.wire import Answer, Wire

_Result = TypeVar("_Result")

Ended: TypeAlias = tuple[int, float, float, str, str | None, bytes]
"""A request's number in the schedule, its lag, latency, code, reason and answer. The garbage collector does not track
tuples of plain values; walking through as many dataclasses would halt a long run for tens of milliseconds."""

_Call: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"

RUN_UP = 0.05
"""Seconds between reading the clock and the first request."""

# A call with more seconds than this has no gRPC deadline: gRPC takes a deadline centuries away for one in the past.
_LONGEST_TIMEOUT = 1e9

PROGRESS_INTERVAL = 0.25
"""Seconds between reports of progress."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server that is measured, and how it is connected to."""

    target: str
    tls: bool | grpc.ChannelCredentials
    root_certificates: bytes | None
    client_certificate: bytes | None
    client_key: bytes | None
    metadata: Metadata
    health_checks: bool

    def channels(self, number: int) -> list[grpc.aio.Channel]:
        """Opens channels, each with a connection of its own.

        Raises:
            ValueError: The certificates don't go together.
        """
        credentials = channel_credentials(self.tls, self.root_certificates, self.client_certificate, self.client_key)
        options = channel_options(
            self.target,
            retries=False,
            health_checks=self.health_checks,
            max_send_bytes=DEFAULT_MAX_MESSAGE_BYTES,
            max_receive_bytes=DEFAULT_MAX_MESSAGE_BYTES,
        )
        return [
            grpc.aio.insecure_channel(self.target, options)
            if credentials is None
            else grpc.aio.secure_channel(self.target, credentials, options)
            for _ in range(number)
        ]


@dataclass(frozen=True, slots=True)
class Sent:
    """What one process has sent, and how it ended."""

    ended: list[Ended]
    """In order of completion, without the requests of the warm-up."""
    elapsed: float
    """Seconds from the start of the measured run to the end of this."""
    stopped: bool
    """Whether it was ended early."""


class Sender:
    """One process's share of a run: its clock, its calls and their outcomes."""

    def __init__(
        self,
        server: Server,
        plan: LoadPlan,
        wire: Wire,
        channels: Sequence[grpc.aio.Channel],
        requests: Sequence[tuple[int, PlannedRequest]],
    ) -> None:
        self.server = server
        self.plan = plan
        self.wire = wire
        # Calls take and return bytes: messages are made before the run, and answers are read after it.
        self.calls: list[_Call] = [channel.unary_unary(wire.method) for channel in channels]
        self.requests = requests
        self.options = {budget: wire.options(budget) for budget in {one.budget for _, one in requests}}
        self.images: dict[int, bytes] = {}
        self.ended: list[Ended] = []
        self.sent = 0
        self.judged = 0
        self.attained = 0
        self.start = 0.0

    async def encode_images(self) -> None:
        """Makes the messages of the images that this process sends."""
        for index in sorted({one.sample for _, one in self.requests}):
            self.images[index] = self.wire.image(self.plan.samples[index])
            # Decoding thousands of images takes long, and Ctrl-C must be seen meanwhile.
            await asyncio.sleep(0)

    async def run(self, start: float, progress: Callable[[Progress], None] | None, stop: asyncio.Event | None) -> Sent:
        """Sends the requests.

        Args:
            start: When the measured run starts, on the clock time.perf_counter, which all processes share.
            progress: Called a few times a second.
            stop: Ends it early when set.
        """
        self.start = start
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
        return Sent(self.ended, elapsed, stopped)

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as in_flight:
            for position, (number, request) in enumerate(self.requests):
                # For an overdue request too: meanwhile answers must be read.
                await asyncio.sleep(max(0.0, self.start + request.at - time.perf_counter()))
                in_flight.create_task(self._send(number, request, self.calls[position % len(self.calls)]))

    async def _send(self, number: int, request: PlannedRequest, call: _Call) -> None:
        due = self.start + request.at
        lag = time.perf_counter() - due
        measured = request.at >= 0
        self.sent += measured
        allowed = request.budget + self.plan.allowed_lateness - lag
        message = self.options[request.budget] + self.images[request.sample]
        code, reason, answer = "OK", None, b""
        try:
            timeout = max(0.0, allowed) if allowed < _LONGEST_TIMEOUT else None
            answer = await call(message, timeout=timeout, metadata=self.server.metadata)
            latency = time.perf_counter() - due
        except grpc.RpcError as failure:
            latency = time.perf_counter() - due
            code, reason = self.wire.ending(error_from_rpc(failure, self.server.target))
        if measured:
            self.ended.append((number, lag, latency, code, reason, answer))
            if math.isfinite(request.budget):
                self.judged += 1
                self.attained += code == "OK" and latency <= request.budget

    async def _report(self, progress: Callable[[Progress], None]) -> None:
        while True:
            at = time.perf_counter() - self.start
            progress(Progress(at, self.plan.duration, self.sent, len(self.ended), self.judged, self.attained))
            await asyncio.sleep(PROGRESS_INTERVAL)


@asynccontextmanager
async def connected(
    server: Server, plan: LoadPlan, process: int = 0, stop: asyncio.Event | None = None
) -> AsyncIterator[Sender]:
    """Connects to the server and makes one process's messages; closes the connections at the end.

    Args:
        server: The server.
        plan: The whole run.
        process: Index of the process, which takes every `plan.processes`-th request from this one.
        stop: Ends it early when set.

    Raises:
        TomeError: The server did not describe its model, or `stop` was set before it did (CANCELLED).
        ValueError: The images can't be sent to this model.
    """
    channels = server.channels(plan.connections)
    try:
        yield await unless(stop, _sender(server, plan, process, channels))
    finally:
        for channel in channels:
            await channel.close()


async def _sender(server: Server, plan: LoadPlan, process: int, channels: Sequence[grpc.aio.Channel]) -> Sender:
    describe = describe_open_inference if plan.oip else describe_native
    # On each channel: this also connects, so that the first request need not wait for that.
    wires: list[Wire] = await asyncio.gather(
        *(describe(channel, plan, server.target, server.metadata) for channel in channels)
    )
    share = list(enumerate(plan.schedule()))[process :: plan.processes]
    sender = Sender(server, plan, wires[0], channels, share)
    await sender.encode_images()
    return sender


async def unless(stop: asyncio.Event | None, preparing: Coroutine[None, None, _Result]) -> _Result:
    """Awaits what comes before the run, which takes long if no server is there; ends early if `stop` is set.

    Raises:
        TomeError: `stop` was set first (CANCELLED).
    """
    prepared = asyncio.create_task(preparing)
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({prepared, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not prepared.done():
            raise TomeError(grpc.StatusCode.CANCELLED, "stopped before the run began")
        return prepared.result()
    finally:
        for task in (prepared, stopping):
            task.cancel()
        await asyncio.gather(prepared, stopping, return_exceptions=True)


def load_result(plan: LoadPlan, wire: Wire, parts: Sequence[Sent]) -> LoadResult:
    """Returns the result of a run from what each of its processes has sent."""
    schedule = plan.schedule()
    ended = [one for part in parts for one in part.ended]
    if len(parts) > 1:
        ended.sort(key=lambda one: schedule[one[0]].at + one[2])
    stopped = any(part.stopped for part in parts)
    elapsed = max(part.elapsed for part in parts)
    duration = max(0.0, min(elapsed, plan.duration)) if stopped else plan.duration
    outcomes = tuple(_outcome(plan, wire, schedule[one[0]], one) for one in ended)
    return LoadResult(plan, wire.model, outcomes, duration, stopped)


def _outcome(plan: LoadPlan, wire: Wire, request: PlannedRequest, ended: Ended) -> Outcome:
    number, lag, latency, code, reason, message = ended
    sample = plan.samples[request.sample]
    # A failure is a wrong answer, where there is one to compare with.
    unanswered = Answer(None, None, right=False if wire.judged(sample) else None)
    answer = wire.read(message, sample) if code == "OK" else unanswered
    return Outcome(
        at=request.at,
        lag=lag,
        latency=latency,
        budget=request.budget,
        image=sample.name,
        code=code,
        reason=reason,
        merging=answer.merging,
        timing=answer.timing,
        right=answer.right,
        process=number % plan.processes,
    )
