"""What one HTTP connection may cost before a request is understood: bytes, lines, time, and its place among others.

uvicorn with httptools bounds none of these: it keeps a head of any length, copies a long header anew for each packet,
and waits for the rest of a request without a limit.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of a request's target, and of its head with that or of the trailers after its body. Beyond: 414 and 431.
MOST_TARGET = 8 * 2**10
MOST_HEAD = 32 * 2**10
MOST_LINES = 100
# Chunks of a body: parsing takes a microsecond for each, however short it is.
MOST_CHUNKS = 2**16
# Requests that a client may send on one connection before it has the answers to those before them.
MOST_PIPELINED = 16
# Seconds from connecting, or from the first byte of a later request, to the end of a head; beyond: 408. The same for a
# body, from its head on.
HEAD_TIME = 10.0
BODY_TIME = 60.0
# Seconds in which a client must take 64 KiB of what is being sent to it, or all of that.
STALL_TIME = 30.0
STALL_BYTES = 2**16
# Seconds to read and drop what a refused client still sends. Closing before it stops would lose the refusal.
LINGER = 2.0


@dataclass
class Connections:
    """The connections that are open, which are bounded in all and for each address."""

    most: int
    most_per_address: int
    by_address: Counter[str] = field(default_factory=Counter)

    def enter(self, address: str) -> str | None:
        """Count a connection; return why there is no place for it instead, if there is none."""
        if self.by_address.total() >= self.most:
            return f"the server has {self.most:,} connections open, which is the most that it takes"
        if self.by_address[address] >= self.most_per_address:
            return f"your address has {self.most_per_address:,} connections open, which is the most that one may have"
        self.by_address[address] += 1
        return None

    def leave(self, address: str) -> None:
        """Forget a connection that was counted."""
        self.by_address[address] -= 1
        if not self.by_address[address]:
            del self.by_address[address]


class _RefusedError(Exception):
    """Raised in the parser's callbacks to stop it."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is answered and closed when it exceeds a bound."""

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._open = connections
        self._address: str | None = None
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_request = False
        # Bytes and lines of the head so far, chunks of the body, and bytes that the parser has made nothing of yet.
        self._head = self._lines = self._chunks = self._held = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it where there are too many."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        full = self._open.enter(address)
        if full is not None:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, full)
            self._refused = True
            transport.close()
            return
        self._address = address
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        if self._address is not None:
            self._open.leave(self._address)
            self._address = None
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the client was refused already."""
        if self._refused:
            return
        if self._timer is None:
            self._wait_for_head()
        self._held += len(data)
        super().data_received(data)
        if not self._refused and self._held > MOST_HEAD:
            self._refuse(*self._too_long())

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser stopped at, which may be a bound of ours."""
        self._refuse(*(self._refusal or (HTTPStatus.BAD_REQUEST, msg)))

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_request = True
        if self._timer is None:  # what came before it in the same packet ended a request
            self._wait_for_head()
        self._head = self._lines = self._chunks = self._held = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        super().on_url(url)
        if len(self.url) > MOST_TARGET:
            text = f"the request's target is longer than {MOST_TARGET:,} bytes"
            self._stop(HTTPStatus.REQUEST_URI_TOO_LONG, text)
        self._count(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a line of the head, or of the trailers."""
        self._count(len(name) + len(value), 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, and to wait for the body."""
        self._held = 0
        if len(self.pipeline) >= MOST_PIPELINED:
            text = f"more than {MOST_PIPELINED} requests were sent before the answer to the first"
            self._stop(HTTPStatus.TOO_MANY_REQUESTS, text)
        super().on_headers_complete()
        self._head = self._lines = 0
        self._set_timer(BODY_TIME, self._body_late)

    def on_chunk_header(self) -> None:
        """Begin a chunk of the body."""
        self._held = 0
        self._chunks += 1
        if self._chunks > MOST_CHUNKS:
            text = f"the body comes in more than {MOST_CHUNKS:,} chunks; send larger ones"
            self._stop(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; the next may take its time to begin."""
        self._held = 0
        self._in_request = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        if self._stalled is None:
            self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Go on, for the client has read."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _watch(self, unread: int) -> None:
        self._stalled = self.loop.call_later(STALL_TIME, self._check_reading, unread)

    def _check_reading(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if before - unread < STALL_BYTES:
            self.transport.abort()
        else:
            self._watch(unread)

    def _count(self, size: int, lines: int) -> None:
        self._held = 0
        self._head += size
        self._lines += lines
        if self._head > MOST_HEAD or self._lines > MOST_LINES:
            self._stop(*self._too_long())

    def _too_long(self) -> tuple[HTTPStatus, str]:
        text = f"the request's head is longer than {MOST_HEAD:,} bytes or {MOST_LINES} lines"
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text

    def _stop(self, status: HTTPStatus, text: str) -> None:
        self._refusal = status, text
        raise _RefusedError(text)

    def _wait_for_head(self) -> None:
        self._set_timer(HEAD_TIME, self._head_late)

    def _set_timer(self, seconds: float, late: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, late)

    def _head_late(self) -> None:
        if self._answering():
            self._close_after_answers()
        elif self._in_request:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's head did not come within {HEAD_TIME:.0f} s")
        else:
            self.transport.close()

    def _body_late(self) -> None:
        # A handler that reads the body has answered 408 by now: see `body.py`. One that doesn't has answered long ago.
        if self._answering():
            self._close_after_answers()
        else:
            self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_after_answers(self) -> None:
        """Read no more, and close once all that was asked before is answered."""
        self._refused = True
        self.cycle.keep_alive = False

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Answer and close, or only close where earlier requests wait for their answers or one has begun to come."""
        answering = self._answering()
        if answering and (self.cycle.response_started or self.pipeline or not self._in_body()):
            self._close_after_answers()
            return
        self._refused = True
        self._answer(status, text)
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(LINGER, self.transport.abort)

    def _in_body(self) -> bool:
        return self._in_request and self.cycle.more_body

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
