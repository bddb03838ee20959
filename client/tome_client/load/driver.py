"""Runs a load: in this process, or in several that share its requests."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterable

import grpc

from tome_client.channel import call_metadata
from tome_client.load.outcome import LoadResult, Progress
from tome_client.load.plan import LoadPlan
from tome_client.load.processes import run_in_processes
from tome_client.load.sending import RUN_UP, Server, connected, load_result


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
        ValueError: The model does not have a label, or can't be sent the images; Client would not accept the
            certificates or the token; several processes can't share `tls` because it is a grpc.ChannelCredentials.
        ChildProcessError: One of several processes ended before its requests did.
        ImportError: The model takes pixels, and Pillow is not installed.
    """
    sent_along = call_metadata(metadata, token)()
    server = Server(target, tls, root_certificates, client_certificate, client_key, sent_along, health_checks)
    if plan.processes > 1:
        return await run_in_processes(server, plan, progress, stop)
    async with connected(server, plan, stop=stop) as sender:
        sent = await sender.run(time.perf_counter() + RUN_UP + plan.warmup, progress, stop)
        return load_result(plan, sender.wire, [sent])


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns a new event loop whose timers fire within about 0.1 ms of their time.

    asyncio's own loop waits in whole milliseconds, as epoll does; select waits in microseconds. select takes only file
    descriptors below 1024, which is no limit here: the loop does not hold gRPC's connections.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
