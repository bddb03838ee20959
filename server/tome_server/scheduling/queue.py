"""The queue of requests that wait for the device: earliest deadline first, in batches of equals.

Pure: it reads no clock and starts nothing; the caller says what time it is.
"""

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How batches are formed."""

    max_batch: int = 8
    max_delay: float = 0.0
    """Seconds that a request may wait for batch-mates while the device is idle."""


@dataclass(eq=False)
class Ticket(Generic[T]):
    """A request's place in the queue."""

    item: T
    group: Hashable
    deadline: float
    arrival: float
    waiting: bool = True


@dataclass(eq=False)
class _Group(Generic[T]):
    """Tickets that may share a batch. Tickets that stopped waiting stay in the heaps until they surface or prevail."""

    size: int = 0
    by_deadline: list[tuple[float, int, Ticket[T]]] = field(default_factory=list)
    by_arrival: list[tuple[float, int, Ticket[T]]] = field(default_factory=list)

    def first(self) -> Ticket[T]:
        return _first(self.by_deadline)

    def oldest(self) -> Ticket[T]:
        return _first(self.by_arrival)

    def compact(self) -> None:
        """Drop tickets that stopped waiting from a heap that holds more of them than of the others."""
        for heap in (self.by_deadline, self.by_arrival):
            if len(heap) > 2 * self.size:
                heap[:] = [entry for entry in heap if entry[2].waiting]
                heapq.heapify(heap)


class DeadlineQueue(Generic[T]):
    """Earliest deadline first; requests that tie go in order of arrival.

    push, cancel and take cost O(log n) a ticket, averaged over many. Tickets that stopped waiting are kept for a while,
    but never more of them than of the others.

    A batch holds tickets of one group only (the same model at the same r): the group of the earliest deadline.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._groups: dict[Hashable, _Group[T]] = {}
        self._serial = itertools.count()

    def __len__(self) -> int:
        return sum(group.size for group in self._groups.values())

    def push(self, item: T, *, group: Hashable, arrival: float, deadline: float = math.inf) -> Ticket[T]:
        """Add a request; both times in seconds of the caller's clock."""
        ticket = Ticket(item, group, deadline, arrival)
        serial = next(self._serial)
        members = self._groups.setdefault(group, _Group())
        heapq.heappush(members.by_deadline, (deadline, serial, ticket))
        heapq.heappush(members.by_arrival, (arrival, serial, ticket))
        members.size += 1
        return ticket

    def cancel(self, ticket: Ticket[T]) -> bool:
        """Remove a request; returns whether it still waited."""
        if not ticket.waiting:
            return False
        ticket.waiting = False
        members = self._groups[ticket.group]
        members.size -= 1
        if members.size == 0:
            del self._groups[ticket.group]
        else:
            members.compact()
        return True

    def ready_at(self) -> float | None:
        """Return when the next batch may start, -inf for at once; None if nobody waits.

        It waits `max_delay` for batch-mates, but not while another batch is full, nor past its earliest deadline.
        """
        group = self._next_group()
        if group is None:
            return None
        start = group.oldest().arrival + self._limits.max_delay
        full = any(members.size >= self._limits.max_batch for members in self._groups.values())
        return -math.inf if full or start >= group.first().deadline else start

    def take(self, now: float) -> list[T]:
        """Remove and return the next batch, without requests whose deadline has passed: those are dropped."""
        self._drop_expired(now)
        group = self._next_group()
        batch: list[T] = []
        while group is not None and group.size > 0 and len(batch) < self._limits.max_batch:
            ticket = group.first()
            self.cancel(ticket)
            batch.append(ticket.item)
        return batch

    def _drop_expired(self, now: float) -> None:
        while (group := self._next_group()) is not None and (ticket := group.first()).deadline <= now:
            self.cancel(ticket)

    def _next_group(self) -> _Group[T] | None:
        return min(
            self._groups.values(), key=lambda group: (group.first().deadline, group.by_deadline[0][1]), default=None
        )


def _first(heap: list[tuple[float, int, Ticket[T]]]) -> Ticket[T]:
    while not heap[0][2].waiting:
        heapq.heappop(heap)
    return heap[0][2]
