"""Who asks: known where a call arrives, and needed where it is admitted and logged."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tome_server.errors import ClientLimitError

# A token's short name or an address, the same for all calls of one client. Empty where nobody said.
client: ContextVar[str] = ContextVar("client", default="")
# The W3C header of the trace that the call belongs to, as it came.
traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)


class Shares:
    """How many requests each client has in the server, and the most it may."""

    def __init__(self, most: int | None, retry_after: float) -> None:
        self._most = most
        self._retry_after = retry_after
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count a request of the present client. Raises ClientLimitError if it has as many as it may."""
        who = client.get()
        if self._most is None or not who:
            yield
            return
        if self._held[who] >= self._most:
            raise ClientLimitError(self._most, self._retry_after)
        self._held[who] += 1
        try:
            yield
        finally:
            self._held[who] -= 1
            if not self._held[who]:
                del self._held[who]  # else all that ever came would be remembered
