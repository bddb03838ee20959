"""A lock that is given in the order in which it was asked for.

A thread that gives one of Python's locks back and asks for it again gets it before one that waits for it wakes up: who
does so in a loop lets nobody in until it is done.
"""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """Entered by one thread at a time, the one that has waited longest; not by one that has it already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for it."""
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
                self._queue.popleft().set()  # it stays taken, by who is next
            else:
                self._taken = False
