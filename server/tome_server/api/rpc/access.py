"""Access control, and the end of calls that fail: one interceptor for the methods of every service."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from tome_server.api.failures import final_status
from tome_server.api.rpc import health
from tome_server.api.status import abort
from tome_server.api.tokens import Tokens
from tome_server.observability import request_context
from tome_server.observability.metrics import Metrics
from tome_server.observability.trace_context import trace_context

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# Probes of orchestrators and load balancers have no tokens.
OPEN = f"/{health.SERVICE}/"


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, if tokens are required, and sets the `request_context`.

    A call that raises, in whatever service, ends with the contract's status. gRPC itself would send the error's text.
    """

    def __init__(self, tokens: Tokens | None, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Called before a message of the call is read."""
        try:
            return await self._handler(continuation, details)
        except Exception as error:
            status = final_status(error)

            async def fail(_requests: object, context: Context) -> None:
                async with _ended(context):
                    await abort(context, status)

            return grpc.stream_stream_rpc_method_handler(fail)

    async def _handler(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"],
        details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        holder = None
        if self._tokens is not None and not str(details.method).startswith(OPEN):
            given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
            holder = self._tokens.holder(given[0]) if len(given) == 1 else None
            if holder is None:
                self._metrics.requests.labels("unknown", "UNAUTHENTICATED").inc()
                # As a stream, whatever the method is: a stream's handler can refuse before any message is read.
                return grpc.stream_stream_rpc_method_handler(_refuse)
        traceparents = [str(value) for key, value in details.invocation_metadata or () if key == "traceparent"]
        request_context.trace.set(trace_context(traceparents))
        handler = await continuation(details)
        return _known(handler, holder) if handler else None


async def _refuse(_requests: object, context: Context) -> None:
    async with _ended(context):
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "send metadata `authorization: Bearer TOKEN` with a known token"
        )


@asynccontextmanager
async def _ended(context: Context) -> AsyncIterator[None]:
    """Abort a call that raises, and free it as soon as it was aborted.

    gRPC keeps the exception of an abort in the call, and the exception's frames hold the call. Only the garbage
    collector would break this cycle, seconds or hours later. Until then the call counts against its connection's limit.
    """
    try:
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, final_status(error))
    except grpc.aio.AbortError as error:
        error.__traceback__ = error.__context__ = None


def _known(handler: Any, holder: str | None) -> Handler:
    """Return a handler that first sets the client in the request context: the token's holder, else the address."""
    kind = next(
        kind for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream") if getattr(handler, kind)
    )
    inner = getattr(handler, kind)

    # gRPC runs each call in a task of its own, so what is set here holds for the call and its tasks alone.
    async def one(request: object, context: Context) -> object:
        request_context.client.set(holder or address(context.peer()))
        async with _ended(context):
            return await inner(request, context)

    async def many(request: object, context: Context) -> AsyncIterator[object]:
        request_context.client.set(holder or address(context.peer()))
        async with _ended(context), aclosing(inner(request, context)) as responses:
            async for response in responses:
                yield response

    known: Handler = handler._replace(**{kind: many if handler.response_streaming else one})
    return known


def address(peer: str) -> str:
    """Return the peer without its port: "ipv4:10.0.0.1" for "ipv4:10.0.0.1:5000"."""
    return unquote(peer).rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
