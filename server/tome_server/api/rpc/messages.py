"""Reads the messages of calls, so that malformed ones get the same status as any other invalid request.

gRPC itself would answer them with UNKNOWN and log a traceback, and would leave a call without a message open until its
client gives up.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from tome_server.api.reading import FEW
from tome_server.api.rpc.message_fields import check_fields
from tome_server.api.status import abort, code_name, status_of
from tome_server.errors import InvalidRequestError, RequestError, SlowBodyError
from tome_server.observability.metrics import Metrics

# Seconds within which the message of a call that has only one must arrive; gRPC holds the part of it that has. The
# messages of a stream may be any time apart.
MESSAGE_TIME = 60.0

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Parse: TypeAlias = Callable[[bytes], object]
M = TypeVar("M", bound=RequestError)


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Parses the messages for the methods of every service. An unreadable one ends its call with INVALID_ARGUMENT."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Called before a message of the call is read."""
        handler: Any = await continuation(details)
        return self._reading(handler) if handler else None

    def _reading(self, handler: Any) -> Handler:
        """Return a handler that takes a stream of bytes, because gRPC doesn't read the messages of streams itself."""
        takes = "stream" if handler.request_streaming else "unary"
        gives = "stream" if handler.response_streaming else "unary"
        inner, parse = getattr(handler, f"{takes}_{gives}"), handler.request_deserializer or bytes

        async def given(requests: AsyncIterator[bytes], context: Context) -> object:
            if handler.request_streaming:
                return self._messages(requests, parse)
            try:
                async with asyncio.timeout(MESSAGE_TIME):
                    request: Any = await context.read()
            except TimeoutError:
                raise self._refused(SlowBodyError("request", f"did not come within {MESSAGE_TIME:.0f} s")) from None
            if request is grpc.aio.EOF:
                raise self._refused(
                    InvalidRequestError("request", "is missing: the call sent no message, or not all of it")
                )
            return self._parsed(request, parse)

        async def one(requests: AsyncIterator[bytes], context: Context) -> object:
            try:
                return await inner(await given(requests, context), context)
            except RequestError as error:
                await abort(context, status_of(error))

        async def many(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[object]:
            try:
                async with aclosing(inner(await given(requests, context), context)) as responses:
                    async for response in responses:
                        yield response
            except RequestError as error:
                await abort(context, status_of(error))

        changes = {f"{takes}_{gives}": None, f"stream_{gives}": many if handler.response_streaming else one}
        reading: Handler = handler._replace(**changes, request_streaming=True, request_deserializer=None)
        return reading

    async def _messages(self, requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[object]:
        async for request in requests:
            yield self._parsed(request, parse)

    def _parsed(self, request: bytes, parse: Parse) -> object:
        try:
            if len(request) > FEW and (kind := _kind(parse)) is not None:
                check_fields(request, kind)
            return parse(request)
        except DecodeError as error:
            raise self._refused(InvalidRequestError("request", f"can't be read: {error}")) from None
        except RequestError as error:
            raise self._refused(error) from None

    def _refused(self, error: M) -> M:
        """Count and log a message that was not read."""
        self._metrics.requests.labels("unknown", code_name(status_of(error))).inc()
        log.debug("%s", error)
        return error


def _kind(parse: Parse) -> Descriptor | None:
    """Return what kind of message a method takes, None for bytes: gRPC parses by the class's method FromString."""
    kind = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    return kind if isinstance(kind, Descriptor) else None
