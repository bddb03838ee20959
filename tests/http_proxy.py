"""An HTTP proxy as companies have them, on loopback."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


class HttpProxy(ThreadingTCPServer):
    """Connects to `upstream` whatever it is asked to connect to; without one it refuses.

    `asked` has the first line of every request.
    """

    daemon_threads = True

    def __init__(self, upstream: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.upstream = upstream
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """This process's environment, but that it asks for this proxy and excepts nothing."""
        kept = {name: value for name, value in os.environ.items() if name not in EXCEPTIONS}
        return kept | dict.fromkeys(VARIABLES, f"http://{self.address}")


@contextmanager
def running_proxy(upstream: str | None = None) -> Iterator[HttpProxy]:
    with HttpProxy(upstream) as proxy:
        serving = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            serving.join()


class _Handler(StreamRequestHandler):
    server: HttpProxy

    def handle(self) -> None:
        asked = self.rfile.readline().decode().strip()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append(asked)
        if self.server.upstream is None:
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return
        host, _, port = self.server.upstream.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(upstream, self.connection))
            back.start()
            _pass_on(self.connection, upstream)
            back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
