"""What a batch leaves to the next: requests that can still be met when it ends, and what the best batch of them earns.

The requests in the queue are known. Newcomers are expected as they have been coming in: at their rate, evenly over the
time that the batch takes, each with the budget of its class. Everything after that next batch is valued by the price of
device time alone.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from tome_server.scheduling.policy.view import View
from tome_server.scheduling.profile import BySize
from tome_server.scheduling.queue import Waiting

# Sizes of the next batch.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Requests beyond this many of the largest batches don't matter to the next.
_BATCHES = 3


class Lookahead:
    """The state of the device from now on, at one price of its time."""

    def __init__(
        self,
        view: View,
        waiting: Sequence[Waiting[Any]],
        quality: Sequence[float],
        price: float,
        typical: int,
        merged: BySize,
    ) -> None:
        """`waiting` has deadlines. `quality` is by level; `typical` is the size of the batches when time is short.

        `merged` is what batches take that are merged the most.
        """
        latency, largest, top = view.latency, view.latency.max_batch, len(quality) - 1
        self.slacks = [request.due - view.now for request in waiting[: _BATCHES * largest]]
        """Seconds that each of the first requests has left."""
        self._total = len(self.slacks)
        image = price * latency.drift / typical
        net = [worth - image * median for worth, median in zip(quality, latency.medians(typical), strict=True)]
        usual = max(range(top + 1), key=net.__getitem__)
        # What a request is worth on average, at this price of the time that it takes.
        self._worth = max(0.0, net[usual])
        # Of each class of newcomers: the budget, and how many come a second. And how many of all.
        self._classes, before = list[tuple[float, float]](), 0.0
        for budget, part in view.traffic.budgets:
            self._classes.append((budget, (part - before) * view.traffic.rate))
            before = part
        self._tightest = self._classes[0][0] if self._classes else math.inf
        self._rate = sum(rate for _, rate in self._classes)
        # Of each next batch: its size, the slack it needs, the slack that a request needs which runs after it, and what
        # it earns.
        self._batches = list[tuple[int, float, float, float]]()
        # The most that one earns beyond the average worth of its members.
        self._gain = 0.0
        alone = merged.promised[1]
        for size in takewhile(largest.__ge__, _SIZES):
            seconds = merged.expected[size]
            earns = size * quality[top] - price * seconds
            if usual != top:
                earns = max(earns, size * quality[usual] - price * latency.expected(size, usual))
            self._batches.append((size, merged.promised[size], seconds + alone, earns))
            if (gain := earns - self._worth * size) > self._gain:
                self._gain = gain

    def at_most(self, size: int) -> float:
        """Return a bound that `after` never exceeds for a batch of `size`, however long that takes.

        The bound supposes that all the others can be met, each with the average worth, and that the next batch earns as
        much beyond that as any does. Newcomers add nothing to it: `after` subtracts all of them, and no more are met.
        """
        return self._gain + self._worth * (self._total - size)

    def after(self, seconds: float, first: int, size: int) -> float:
        """Return what a batch of `size` requests from `first` on leaves that takes `seconds`.

        That is what the best next batch earns, and the average worth of the requests that can be met after it, less
        that of all newcomers: what becomes of these counts, not how many come.
        """
        best, worth, met = 0.0, self._worth, self._met
        for many, needs, later, earns in self._batches:
            ready = met(needs, seconds, first, size)
            if ready <= 0:
                break
            total = earns if ready >= many else earns * ready / many
            if worth and ready > many:
                total += worth * min(ready - many, met(later, seconds, first, size))
            best = max(best, total)
            if ready <= many:
                break
        return best - worth * self._rate * seconds

    def _met(self, needs: float, seconds: float, first: int, size: int) -> float:
        """Return how many requests can be expected to have `needs` seconds left when `seconds` have passed."""
        late = bisect_left(self.slacks, seconds + needs)
        end = first + size
        many: float = self._total - (end if end > late else late)
        if late < first:
            many += first - late
        if seconds + needs <= self._tightest:  # no newcomer waits too long
            return many + self._rate * seconds
        for budget, rate in self._classes:
            room = budget - needs
            if room > 0:
                many += rate * (seconds if seconds < room else room)
        return many
