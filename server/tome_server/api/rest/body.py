"""Reads the body of a request, and inflates it if it is compressed, within one limit."""

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from tome_server.api.oip.messages import shown
from tome_server.api.rest.connection import BODY_TIME
from tome_server.errors import (
    ClientGoneError,
    CrowdedError,
    EncodingError,
    InvalidRequestError,
    SlowBodyError,
    TooLargeError,
)
from tome_server.serving.engine import RETRY_AFTER

IDENTITY = "identity"
# zlib's window bits: 15 for its own format, which HTTP calls deflate, and 16 more for gzip's.
CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
# Compressed bytes that are inflated in the event loop; more take a thread.
_FEW = 4096


class BodyMemory:
    """The bytes of all bodies in the server, which are bounded together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def holding(self) -> Iterator["BodyShare"]:
        """Yield one request's share, which is given back at the end."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._held -= share.size

    def take(self, size: int) -> None:
        """Count bytes. Raises CrowdedError instead if there would be too many."""
        if self._held + size > self._most:
            raise CrowdedError(self._most, RETRY_AFTER)
        self._held += size


@dataclass
class BodyShare:
    """The bytes that one request holds."""

    memory: BodyMemory
    size: int = 0

    def take(self, size: int) -> None:
        """Count bytes before they are kept. Raises CrowdedError if all requests would hold too many together."""
        self.memory.take(size)
        self.size += size


async def read_body(request: Request, most: int, share: BodyShare) -> bytes:
    """Return a request's body, inflated, and count it in `share`.

    Raises TooLargeError if it has more than `most` bytes, compressed or not, EncodingError for an unsupported coding,
    SlowBodyError, CrowdedError, InvalidRequestError if it is damaged, and ClientGoneError.
    """
    coding = _coding(request)
    body = await _received(request, most, share)
    if not body and "upgrade" in request.headers:
        # httptools reads no body where the client asks for another protocol, as Java's client does by default.
        text = f"{shown(request.headers['upgrade'])} is not supported, and no body is read with it; send HTTP/1.1 alone"
        raise InvalidRequestError("Upgrade", text)
    if coding is None or not body:
        return body
    if len(body) <= _FEW:
        content = inflated(body, coding, most)
    else:
        content = await asyncio.to_thread(inflated, body, coding, most)
    share.take(len(content))
    return content


def inflated(body: bytes, coding: str, most: int) -> bytes:
    """Return the inflated body. Raises TooLargeError as soon as it exceeds `most` bytes, and InvalidRequestError."""
    inflating = zlib.decompressobj(CODINGS[coding])
    try:
        # One byte more than the limit, to tell a body that just fits from one that doesn't.
        content = inflating.decompress(body, most + 1)
    except zlib.error as error:
        raise InvalidRequestError("body", f"is not {coding}: {error}") from None
    if len(content) > most:
        raise _too_large(most)
    if not inflating.eof:
        raise InvalidRequestError("body", f"is not {coding}: it ends too early")
    if inflating.unused_data:
        raise InvalidRequestError("body", f"is not {coding} alone: {len(inflating.unused_data):,} bytes follow it")
    return content


def _coding(request: Request) -> str | None:
    """Return the body's content coding, None if it isn't compressed."""
    lines = request.headers.getlist("content-encoding")
    names = [name.strip().lower() for line in lines for name in line.split(",")]
    codings = [name for name in names if name not in ("", IDENTITY)]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in CODINGS:
        known = f"{', '.join(CODINGS)} or {IDENTITY}"
        raise EncodingError("Content-Encoding", f"is {shown(', '.join(lines))}, and must be one of {known}")
    return codings[0]


async def _received(request: Request, most: int, share: BodyShare) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                share.take(len(part))
                parts.append(part)
    except TimeoutError:
        raise SlowBodyError("body", f"did not come within {BODY_TIME:.0f} s") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return b"".join(parts)


def _too_large(most: int) -> TooLargeError:
    return TooLargeError(f"the body has more than {most:,} bytes, which is the most that is taken")
