"""Messages between two processes over a socket, of which one end, the server's, never waits for the other.

A process that has stopped neither reads nor sends: whatever waits for it in the event loop stops the whole server.
"""

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

_LENGTH = struct.Struct("!Q")
# Bytes read at once.
_READ = 2**18


class Channel:
    """The server's end: sends as fast as the other end reads, and holds the rest; calls `received` with each message.

    To be used on one event loop. `lost` is called once the other end is closed.
    """

    def __init__(self, end: socket.socket, received: Callable[[Any], None], lost: Callable[[], None]) -> None:
        end.setblocking(False)
        self.closed = False
        self._socket = end
        self._received = received
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end, self._read)
        self._incoming = bytearray()
        self._unsent = bytearray()

    @property
    def unsent(self) -> int:
        """Bytes that wait for the other end to read."""
        return len(self._unsent)

    def send(self, message: object) -> None:
        """Send a message after those before it."""
        if self.closed:
            return
        waits = bool(self._unsent)
        self._unsent += _framed(message)
        if not waits:
            self._write()

    def close(self) -> None:
        """Close this end; what is unsent is lost."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
            return
        except OSError:
            # The other end has gone. What it sent before that is still read, and then its end.
            self._unsent.clear()
        self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        self._incoming += data
        while not self.closed and (message := _first(self._incoming)) is not None:
            self._received(pickle.loads(message))


class BlockingChannel:
    """The other end, which waits for what it reads and for what it sends to be read."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._incoming = end.makefile("rb")

    def send(self, message: object) -> None:
        """Send a message. One thread at a time may."""
        self._socket.sendall(_framed(message))

    def recv(self) -> Any:
        """Return the next message. Raises EOFError once the server's end is closed."""
        header = self._incoming.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            raise EOFError
        [length] = _LENGTH.unpack(header)
        message = self._incoming.read(length)
        if len(message) < length:
            raise EOFError
        return pickle.loads(message)


def _framed(message: object) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


def _first(incoming: bytearray) -> bytes | None:
    """Take the first message out of what has come, if the whole of it has."""
    if len(incoming) < _LENGTH.size:
        return None
    [length] = _LENGTH.unpack_from(incoming)
    end = _LENGTH.size + length
    if len(incoming) < end:
        return None
    message = bytes(memoryview(incoming)[_LENGTH.size : end])
    del incoming[:end]
    return message
