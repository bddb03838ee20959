"""The queue of requests for the device: earliest deadline first. Pure: it reads no clock and starts nothing."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from sortedcontainers import SortedDict

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Waiting(Generic[T]):
    """A request in the queue. Times are seconds of the caller's clock; a level is an index into the r grid."""

    item: T
    arrival: float
    deadline: float
    """The device must be done with it by then; infinite for never."""
    low: int
    """The lowest level that it may run at."""
    high: int
    """The highest level that it may run at."""
    due: float = field(init=False)
    """By when a policy is to have it done: the deadline or, on a shared device, earlier. Set at each decision."""
    serial: int = field(default=-1, init=False)
    """Its place among requests of equal deadline; -1 outside of a queue."""

    def __post_init__(self) -> None:
        self.due = self.deadline


class DeadlineQueue(Generic[T]):
    """Earliest deadline first; requests that tie go in order of arrival. push and remove cost O(log n)."""

    def __init__(self) -> None:
        self._sorted: SortedDict[tuple[float, int], Waiting[T]] = SortedDict()
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Waiting[T]]:
        """Iterate in order of deadlines."""
        # Three times as fast as values(), and policies iterate over the whole queue at each decision.
        return map(self._sorted.__getitem__, self._sorted)

    def holds(self, requests: Iterable[Waiting[T]]) -> bool:
        """Return whether all of these very requests are in the queue."""
        waiting = self._sorted.get
        return all(waiting((request.deadline, request.serial)) is request for request in requests)

    def first(self) -> Waiting[T] | None:
        """Return the request with the earliest deadline, None if the queue is empty."""
        return self._sorted.peekitem(0)[1] if self._sorted else None

    def push(self, request: Waiting[T]) -> None:
        """Add a request."""
        request.serial = next(self._serial)
        self._sorted[request.deadline, request.serial] = request

    def remove(self, request: Waiting[T]) -> bool:
        """Take a request out; returns whether it was in the queue."""
        if not self.holds((request,)):
            return False
        self.take((request,))
        return True

    def take(self, requests: Iterable[Waiting[T]]) -> None:
        """Take out requests that are known to be in the queue."""
        taken = list(requests)
        if taken == list(islice(self, len(taken))):  # nearly always, and then popping is faster
            for _ in taken:
                self._sorted.popitem(0)
            return
        for request in taken:
            del self._sorted[request.deadline, request.serial]

    def due_by(self, deadline: float) -> int:
        """Return how many requests have this deadline or an earlier one."""
        return int(self._sorted.bisect_right((deadline, sys.maxsize)))
