"""Wires the server together, and is the only module that knows all of its parts."""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from tome_server.api.descriptors import ConnectionBounds, connection_bounds, raise_limit
from tome_server.api.oip.service import OpenInference
from tome_server.api.rest.server import HttpServer
from tome_server.api.rpc.server import RpcServer, RpcSettings
from tome_server.api.rpc.tls import TlsFiles
from tome_server.api.tokens import Tokens
from tome_server.config.server import ServerConfig
from tome_server.device.client import Device
from tome_server.errors import ConfigError
from tome_server.execution.cpus import available_cpus
from tome_server.models.sources import find_models
from tome_server.observability.logs import Summary, log_request
from tome_server.observability.metrics import Metrics
from tome_server.serving.control import ModelControl
from tome_server.serving.engine import Engine
from tome_server.serving.model_manager import ModelManager
from tome_server.serving.remeasuring import remeasure
from tome_server.serving.watchdog import watch_device
from tome_server.signals import end_in, stop_line, stop_status

if TYPE_CHECKING:
    # Not part of every installation, and nothing is imported of it where no traces are asked for.
    from tome_server.observability.traces import Traces

log = logging.getLogger(__name__)

# Seconds that answers may take on their way to slow readers, once a part has died and no new ones come.
FAILED_TIMEOUT = 5.0
# Seconds that the server may take to leave once calls in flight have had their time. Then it ends whatever still runs,
# a thread that decodes or the device's process, and however these hang.
LEAVE_TIMEOUT = 3.0


async def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, then answer what is in flight; a second of them ends it at once.

    Prints one line of JSON to standard output once ready: the addresses and what start-up took. Before that, what is
    told to stop stops at once, whatever it loads or measures. Returns the exit status. Raises ConfigError,
    ModelLoadError or PortInUseError, in words for the operator, if it can't start.
    """
    began = time.monotonic()
    wanted = find_models(config)
    async with AsyncExitStack() as stack:
        device = Device()
        stopping = _Stopping(device, config.drain_timeout + LEAVE_TIMEOUT)
        stack.push_async_callback(device.kill)
        engine = _engine(config, [spec.name for spec in wanted.specs], device, stack)
        models = ModelManager(device, engine, config)
        rpc, http = _servers(config, engine, models)
        if http:
            stack.push_async_callback(http.stop)
            await http.start()
        await rpc.start()
        log.info("listening on %s, loading %s", rpc.address, ", ".join(engine.registry.names))
        loading = asyncio.create_task(models.start(wanted))
        _on_hangup(models.refresh)
        dispatching = asyncio.create_task(engine.run())
        remeasuring = asyncio.create_task(remeasure(device, engine, config.profile_time))
        watching: asyncio.Task[Any] | None = None
        ends = [asyncio.create_task(stopping.ordered.wait()), asyncio.create_task(device.ended())]
        grace, status = min(config.drain_timeout, FAILED_TIMEOUT), 1
        try:
            await _first(loading, dispatching, *ends)
            if loading.done():
                rpc.ready()
                watching = asyncio.create_task(
                    watch_device(engine, device, config.hung_device_timeout, hangs=rpc.unready, answers=rpc.ready)
                )
                _say_ready(rpc, http, time.monotonic() - began)
                await _first(dispatching, watching, *ends)
                log.info("stopping; answering what is in flight, for at most %.0f s", config.drain_timeout)
                grace, status = config.drain_timeout, 0
            else:
                log.info(stop_line(stopping.signum))
                grace, status = 0.0, stop_status(stopping.signum)
        finally:
            end = time.monotonic() + grace
            if watching:  # models were served, so that threads may decode
                end_in(grace + LEAVE_TIMEOUT, status, device.end)
                watching.cancel()  # so that health stays NOT_SERVING
            if not loading.done():
                # The device would first finish what it is doing, and nothing waits for that any more.
                await device.kill()
            loading.cancel()
            answered = [rpc.stop(grace)] + ([http.drain(grace)] if http else [])
            await asyncio.gather(*answered)
            dispatching.cancel()
            remeasuring.cancel()
            for each in ends:
                each.cancel()
            await asyncio.gather(loading, dispatching, remeasuring, *ends, return_exceptions=True)
        await device.close(max(0.0, end - time.monotonic()))
    log.info("stopped")
    return status


def _engine(config: ServerConfig, names: list[str], device: Device, stack: AsyncExitStack) -> Engine:
    """Return the engine, with what observes its requests; `stack` closes them. Raises ConfigError."""
    batching = config.batching
    engine = Engine(
        device=device,
        metrics=Metrics(),
        max_delay=batching.max_delay,
        max_pending=batching.max_pending,
        reply_margin=config.reply_margin,
        decode_threads=available_cpus(),
        decode_memory=config.limits.decode_memory,
        names=names,
        max_client_requests=config.limits.max_client_requests,
        observers=[log_request, summary := Summary()],
    )
    stack.callback(summary.write)
    if config.traces:
        traces = _traces(config.traces)
        engine.tracer = traces.begin
        stack.push_async_callback(asyncio.to_thread, traces.close)
    stack.callback(engine.close)
    return engine


def _servers(config: ServerConfig, engine: Engine, models: ModelManager) -> tuple[RpcServer, HttpServer | None]:
    """Return the servers of both protocols, not started yet. Raises ConfigError."""
    connections = config.connections
    bounds = connection_bounds(
        raise_limit(),
        connections.max_connections,
        connections.max_http_connections,
        connections.max_http_connections_per_address,
    )
    service = OpenInference(engine, ModelControl(models) if config.model_control else None)
    settings = _rpc_settings(config, bounds.grpc)
    return RpcServer(engine, service, settings), _http_server(config, service, settings.tokens, bounds)


def _say_ready(rpc: RpcServer, http: HttpServer | None, seconds: float) -> None:
    metrics = f"http://{http.address}/metrics" if http else None
    print(json.dumps({"ready": {"grpc": rpc.address, "metrics": metrics, "seconds": round(seconds, 3)}}), flush=True)
    log.info("ready after %.1f s", seconds)


class _Stopping:
    """The order to stop, by SIGTERM or SIGINT; a second one ends the process at once.

    Its handlers are Python's and not the event loop's, so that the process ends in time even if something blocks that.
    """

    def __init__(self, device: Device, timeout: float) -> None:
        """The process ends `timeout` seconds after the order at the latest."""
        self.ordered = asyncio.Event()
        self.signum = 0
        self._device = device
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._order)

    def _order(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum:
            log.warning("told again to stop: stopping at once, whatever is in flight")
            self._device.end()
            os._exit(128 + signum)
        self.signum = signum
        end_in(self._timeout, stop_status(signum), self._device.end)
        with suppress(RuntimeError):  # the loop is closed: the server has ended by itself
            self._loop.call_soon_threadsafe(self.ordered.set)


def _rpc_settings(config: ServerConfig, max_connections: int) -> RpcSettings:
    """Raises ConfigError for tokens that can't be read."""
    tls, auth, connections = config.tls, config.auth, config.connections
    if auth and not tls:
        log.warning("tokens are sent in plain text, which anyone between client and server can read: set tls")
    return RpcSettings(
        address=config.listen,
        max_image_bytes=config.limits.max_image_bytes,
        tls=TlsFiles(tls.certificate, tls.key, tls.client_ca) if tls else None,
        tokens=Tokens(auth.tokens) if auth else None,
        max_concurrent_streams=connections.max_concurrent_streams,
        max_connections=max_connections,
        compression=connections.compression,
        max_age=connections.max_age,
        max_age_grace=connections.max_age_grace,
        reflection=config.reflection,
    )


def _traces(endpoint: str) -> "Traces":
    """Raises ConfigError if what sends traces isn't installed."""
    try:
        from tome_server.observability.traces import Traces, otlp_processor
    except ModuleNotFoundError as error:
        raise ConfigError(f"traces: {error}; they need: pip install 'tome-serving[tracing]'") from error
    return Traces(otlp_processor(endpoint))


def _http_server(
    config: ServerConfig, service: OpenInference, tokens: Tokens | None, bounds: ConnectionBounds
) -> HttpServer | None:
    if config.metrics is None:
        return None
    return HttpServer(
        service,
        config.metrics,
        max_image_bytes=config.limits.max_image_bytes,
        body_memory=config.limits.body_memory,
        max_connections=bounds.http,
        max_connections_per_address=bounds.http_per_address,
        protocol=config.tls is None if config.rest is None else config.rest,
        tokens=tokens,
    )


def _on_hangup(refresh: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Look at what is stored again, whenever told to by SIGHUP."""
    running: set[asyncio.Task[None]] = set()

    def start() -> None:
        log.info("SIGHUP: looking for models that are new, changed or gone")
        running.add(task := asyncio.create_task(refresh()))
        task.add_done_callback(running.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, start)


async def _first(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for the first of several tasks. Raises what it raised: a part that dies takes the server with it, loudly."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
