"""Access control over HTTP, with the tokens and the names of clients that gRPC uses."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tome_server.api.tokens import Tokens
from tome_server.observability import request_context
from tome_server.observability.metrics import Metrics
from tome_server.observability.trace_context import trace_context

PROTOCOL = "/v2"
# Probes of orchestrators and load balancers have no tokens.
OPEN = "/v2/health/"


class Access:
    """Refuses requests without a known token, if tokens are required, and sets the `request_context`.

    Health and metrics need no token.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, metrics: Metrics) -> None:
        self._app = app
        self._tokens = tokens
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called for each request."""
        path, holder = scope.get("path", ""), None
        if self._tokens is not None and path.startswith(PROTOCOL) and not path.startswith(OPEN):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            holder = self._tokens.holder(given[0]) if len(given) == 1 else None
            if holder is None:
                self._metrics.requests.labels("unknown", "UNAUTHENTICATED").inc()
                refused = JSONResponse(
                    {"error": "send the header Authorization: Bearer TOKEN with a known token"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refused(scope, receive, send)
                return
        request_context.client.set(holder or _address(scope))
        headers = scope.get("headers", ())
        traceparents = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
        request_context.trace.set(trace_context(traceparents))
        await self._app(scope, receive, send)


def _address(scope: Scope) -> str:
    """Return the peer's address in the form that gRPC uses."""
    host = (scope.get("client") or ("",))[0]
    return f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"
