"""Whose call is being answered, and which trace it belongs to: set where a call arrives, read where it is served."""

from contextvars import ContextVar

from tome_server.observability.trace_context import TraceContext

# A token's short name or an address, the same for all calls of one client. Empty where it isn't known.
client: ContextVar[str] = ContextVar("client", default="")
# What the call's W3C header says of its trace; None without one.
trace: ContextVar[TraceContext | None] = ContextVar("trace", default=None)
