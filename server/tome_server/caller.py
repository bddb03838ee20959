"""Who asks: known where a call arrives, and needed where it is admitted and logged."""

from contextvars import ContextVar

# A token's short name or an address, the same for all calls of one client. Empty where nobody said.
client: ContextVar[str] = ContextVar("client", default="")
