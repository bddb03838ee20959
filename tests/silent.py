"""Connections that send nothing or next to nothing: TCP health probes, port scans, clients that have just connected."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, cycle

# What such a connection sends: nothing, part of HTTP/2's preface or all of it, another protocol's first bytes.
SENT = (b"", b"PRI", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0", b"GET / HTTP/1.1\r\n")
# Seconds between two, and how many are held at once.
PAUSE = 0.01
HELD = 50


@contextmanager
def silent_connections(target: str) -> Iterator[None]:
    """Connect again and again for as long as somebody listens; every second one is held to the end, others leave."""
    host, _, port = target.rpartition(":")
    stop = threading.Event()

    def connect() -> None:
        with ExitStack() as held:
            for number, sent in zip(count(), cycle(SENT), strict=False):
                with suppress(OSError):
                    connection = socket.create_connection((host, int(port)), timeout=5)
                    connection.sendall(sent)
                    if number % 2 or number > 2 * HELD:
                        connection.close()
                    else:
                        held.enter_context(connection)
                if stop.wait(PAUSE):
                    return

    connecting = threading.Thread(target=connect)
    connecting.start()
    try:
        yield
    finally:
        stop.set()
        connecting.join()
