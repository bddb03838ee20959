"""The HTTP server, which runs in the event loop of the gRPC server."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from functools import partial

import uvicorn

from tome_server.api.message_limit import message_limit
from tome_server.api.oip.service import OpenInference
from tome_server.api.rest.connection import BoundedProtocol, Connections
from tome_server.api.rest.routes import Protocol, application
from tome_server.api.tokens import Tokens
from tome_server.errors import PortInUseError

# Seconds that an idle connection stays open. Load balancers must close theirs first, or they send into a closed one.
KEEP_ALIVE = 75
# Connections that are accepted in one turn of the event loop, at some 50 µs each; later ones wait in the kernel.
BACKLOG = 256
# Seconds that responses in transit get when the server stops.
LAST_BYTES = 1


class HttpServer:
    """Serves metrics and health, and the Open Inference Protocol if `protocol` is set, from `start` to `stop`.

    `tokens` are required where given, except for health and metrics. Raises PortInUseError if it can't listen on
    `address`.
    """

    def __init__(
        self,
        service: OpenInference,
        address: str,
        *,
        max_image_bytes: int,
        body_memory: int,
        max_connections: int,
        max_connections_per_address: int,
        protocol: bool = True,
        tokens: Tokens | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        self._socket = _listen(host.strip("[]"), int(port), address)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        # As gRPC bounds its messages.
        self._protocol = Protocol(service, message_limit(max_image_bytes), body_memory) if protocol else None
        config = uvicorn.Config(
            application(self._protocol, service, tokens),
            http=partial(BoundedProtocol, Connections(max_connections, max_connections_per_address)),  # type: ignore[arg-type]
            backlog=BACKLOG,
            ws="none",
            lifespan="off",
            log_config=None,
            # Its warnings are about malformed requests, which any client can send.
            log_level="error",
            access_log=False,
            # A client is known by the address that it connects from, not by headers that it may forge.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LAST_BYTES,
        )
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to answer."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait({up, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._serving.done():
            self._serving.result()

    async def drain(self, grace: float) -> None:
        """Wait until the requests in flight are answered, at most `grace` seconds."""
        if self._protocol is not None:
            await self._protocol.drain(grace)

    async def stop(self) -> None:
        """Close every connection."""
        self._server.should_exit = True
        if self._serving is None:
            self._socket.close()
        else:
            await self._serving


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, without its signal handlers, and with an event for when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int, address: str) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        dual = family == socket.AF_INET6 and host in ("", "::") and socket.has_dualstack_ipv6()
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise PortInUseError(f"can't serve metrics on {address}: {error.strerror}") from error
    # Without it a response's body waits 40 ms for the acknowledgement of its head. asyncio sets it only on sockets that
    # were created with TCP as their protocol. Connections inherit it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
