"""The gRPC server: services, health, reflection, limits."""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tome_api.oip import open_inference_pb2_grpc
from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_server.api.message_limit import message_limit
from tome_server.api.oip.service import OpenInference
from tome_server.api.rpc import health, oip_servicer
from tome_server.api.rpc.access import AccessInterceptor
from tome_server.api.rpc.messages import MessageInterceptor
from tome_server.api.rpc.servicer import InferenceServicer
from tome_server.api.rpc.tls import Certificates, TlsFiles
from tome_server.api.tokens import Tokens
from tome_server.errors import PortInUseError
from tome_server.serving.engine import Engine

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
# Bytes of a call's metadata: names, values and 32 for each entry, as HTTP/2 counts them. One limit for both of gRPC's:
# between them, by default 8 and 16 KiB, it refuses calls at random.
MOST_METADATA = 16 * 2**10
# Allows none of gRPC's compression algorithms. The core inflates a message whole before it compares its size with
# `max_receive_message_length`, and 400 kB can become 400 MB. With this it refuses the call by its header.
ONLY_IDENTITY = 1 << grpc.Compression.NoCompression
# Seconds from NOT_SERVING to the first refusal: clients that watch health have gone elsewhere by then.
NOTICE = 0.2
# Seconds to refuse the calls that have already arrived in gRPC's queue, before the server stops.
SETTLE = 0.2
# Seconds of refusals at most. The pauses between the tries of the client's retry policy add up to over twice that, and
# what its throttle lets it fail until then are some hundred calls, of which every second or third comes here.
REFUSING = 0.5


@dataclass(frozen=True)
class RpcSettings:
    """Where the server listens, and its limits."""

    address: str
    """host:port; port 0 picks a free one."""
    max_image_bytes: int
    tls: TlsFiles | None = None
    """None for plain text."""
    tokens: Tokens | None = None
    """Required of every call but health checks; None to require none."""
    max_concurrent_streams: int | None = None
    """Concurrent calls on one connection; clients hold back more."""
    max_connections: int | None = None
    """Concurrent connections; more are closed as they come."""
    compression: bool = False
    """Accept compressed messages."""
    max_age: float | None = None
    """Seconds after which a connection is closed, give or take a tenth, so that its client connects anew."""
    max_age_grace: float | None = None
    """Seconds that calls on such a connection may take to end."""
    reflection: bool = True


class RpcServer:
    """A gRPC server for one engine: listening from `start`, healthy from `ready`."""

    def __init__(self, engine: Engine, oip: OpenInference, settings: RpcSettings) -> None:
        self._engine = engine
        self._server = grpc.aio.server(
            interceptors=[AccessInterceptor(settings.tokens, engine.metrics), MessageInterceptor(engine.metrics)],
            options=server_options(settings),
        )
        # A Watch keeps its stream for as long as the connection lasts: a second must be left for calls.
        watched = settings.max_concurrent_streams != 1
        self._health = health.HealthServicer(("", SERVICE, oip_servicer.SERVICE), watched)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine), self._server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            oip_servicer.OpenInferenceServicer(oip), self._server
        )
        # gRPC consults it after the servicer above, for methods that that doesn't have.
        self._server.add_generic_rpc_handlers((oip_servicer.UnsupportedMethods(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE, oip_servicer.SERVICE, health.SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        host = settings.address.rpartition(":")[0]
        try:
            self.port = self._listen(settings)
        except RuntimeError as error:
            raise PortInUseError(f"can't listen on {settings.address}: {_why_not(settings.address)}") from error
        self.address = f"{host}:{self.port}"

    async def start(self) -> None:
        """Start to listen, NOT_SERVING."""
        await self._server.start()

    def ready(self) -> None:
        """Report SERVING."""
        self._health.ready()

    def unready(self) -> None:
        """Report NOT_SERVING until `ready` again."""
        self._health.stop()

    async def stop(self, grace: float) -> None:
        """Report NOT_SERVING, refuse new calls, and end once calls in flight are answered, or after `grace` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        if self._health.serving:
            self._health.stop()
            await asyncio.sleep(min(NOTICE, grace))
        self._engine.drain()
        # When gRPC stops it tells clients to leave, but cancels calls that it has received and not yet handed over, and
        # few clients retry a cancelled call. So it stops once all calls are answered and new ones were refused for a
        # while. That while is bounded, so that clients that keep the connection aren't refused while a long call runs.
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(end, loop.time() + REFUSING)):
                await self._engine.drained()
                await asyncio.sleep(SETTLE)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._server.stop(max(0.0, end - loop.time())))
            # After gRPC has sent GOAWAY, so that clients don't call Watch again on the same connection.
            await asyncio.sleep(0)
            self._health.close()

    def _listen(self, settings: RpcSettings) -> int:
        if settings.tls is None:
            return self._server.add_insecure_port(settings.address)
        certificates = Certificates(settings.tls)
        self._engine.metrics.certificate(certificates.expiry)
        return self._server.add_secure_port(settings.address, certificates.credentials())


def _why_not(address: str) -> str:
    """Return why the server can't listen on an address, which gRPC doesn't say."""
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return "is the port in use?"


def server_options(settings: RpcSettings) -> list[tuple[str, int]]:
    """Return gRPC's channel arguments."""
    options = [
        ("grpc.max_receive_message_length", message_limit(settings.max_image_bytes)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MOST_METADATA),
        ("grpc.absolute_max_metadata_size", MOST_METADATA),
        # With it a second server on the same port would silently get half of the connections.
        ("grpc.so_reuseport", 0),
        # A connection that stays silent is closed after this time, by default two minutes.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # Clients may ping every 20 s, also between calls, to keep a path through a NAT or proxy open.
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if not settings.compression:
        options.append(("grpc.compression_enabled_algorithms_bitset", ONLY_IDENTITY))
    if settings.max_concurrent_streams is not None:
        options.append(("grpc.max_concurrent_streams", settings.max_concurrent_streams))
    if settings.max_connections is not None:
        options.append(("grpc.max_allowed_incoming_connections", settings.max_connections))
    if settings.max_age is not None:
        options.append(("grpc.max_connection_age_ms", round(settings.max_age * 1e3)))
    if settings.max_age_grace is not None:
        options.append(("grpc.max_connection_age_grace_ms", round(settings.max_age_grace * 1e3)))
    return options
