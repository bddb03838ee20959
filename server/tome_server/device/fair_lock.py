"""A lock that threads get in the order in which they asked for it.

Python's own locks aren't fair: a thread that releases one and acquires it again at once gets it before a waiting thread
wakes up, so a thread that does so in a loop shuts out all others until it is done.
"""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A context manager that one thread at a time may enter, the longest waiting first. It isn't reentrant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """How many threads wait for it."""
        return len(self._queue)

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            self._queue.append(turn)
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()  # it stays taken, now by the next thread
            else:
                self._taken = False
