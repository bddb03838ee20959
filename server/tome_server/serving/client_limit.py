"""Bounds how many requests one client has in the server."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tome_server.errors import ClientLimitError
from tome_server.observability import request_context


class ClientLimit:
    """Counts the requests of each client, and refuses those beyond `limit`; None for any number."""

    def __init__(self, limit: int | None, retry_after: float) -> None:
        """`retry_after` is the number of seconds after which a refused client may retry."""
        self._limit = limit
        self._retry_after = retry_after
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count a request of the present client. Raises ClientLimitError if the client is at its limit."""
        client = request_context.client.get()
        if self._limit is None or not client:
            yield
            return
        if self._held[client] >= self._limit:
            raise ClientLimitError(self._limit, self._retry_after)
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]  # so that clients that have gone take no memory
