"""One model's requests from arrival to the device: admission, queue, and decisions. Pure: the caller knows the time.

Several models may share a device. Then each scheduler accounts for the others: their requests that are due earlier go
before its own, at admission and at each decision, and no batch takes time that their requests were promised.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.view import Decision, Patient, Policy, View, largest, uniform
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import DeadlineQueue, Waiting
from tome_server.scheduling.traffic import HORIZON, TrafficMeter, together

T = TypeVar("T")

log = logging.getLogger(__name__)

_IMAGES_IN_HORIZON = 20
# Deadlines to try in turn when looking for the earliest that could be met.
_MOST_TRIED = 16


def at_once(_: float) -> float:
    """Return when a decoded request, of whatever deadline, is ready to run: at once."""
    return -math.inf


class Scheduler(Generic[T]):
    """Holds the queue of one model, and decides what runs next whenever the device is free.

    Times are seconds of the caller's clock, which must not run backwards.
    """

    def __init__(self, latency: Latency, policy: Policy) -> None:
        self.latency = latency
        self.policy_failures = 0
        """Decisions that were made without the policy, because it raised or broke a bound."""
        self.others: Sequence[Scheduler[Any]] = ()
        """The schedulers of the other models on the device: see `share_device`."""
        self.waiting_since = -math.inf
        """When the queue last stopped being empty."""
        self._policy = policy
        self._queue: DeadlineQueue[T] = DeadlineQueue()
        # Admitted, and still being decoded.
        self._coming: DeadlineQueue[T] = DeadlineQueue()
        self._fastest = _fastest(latency.profile)
        # Long enough to hold several requests, however long each takes.
        self._traffic = TrafficMeter(max(HORIZON, _IMAGES_IN_HORIZON * latency.profile.p50[0][0]))

    def decide_by(self, latency: Latency, policy: Policy) -> None:
        """Predict and decide by these from now on; queued requests stay queued."""
        self.latency = latency
        self._policy = policy

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def deadline(self) -> float:
        """The earliest deadline in the queue, infinite if it is empty."""
        first = self._queue.first()
        return first.deadline if first else math.inf

    @property
    def urgency(self) -> tuple[float, float]:
        """Deadline and arrival of the first request in the queue, both infinite if it is empty."""
        first = self._queue.first()
        return (first.deadline, first.arrival) if first else (math.inf, math.inf)

    def arrived(self, now: float, budget: float) -> None:
        """Count an arrival with a budget of `budget` seconds as traffic, whether it is admitted or not."""
        self._traffic.add(now, budget)

    def check(
        self, request: Waiting[Any], now: float, free_at: float, ready: Callable[[float], float] = at_once
    ) -> None:
        """Raise InfeasibleError if a deadline can't be met even if all earlier ones run at the most merging.

        The device will be free at `free_at`. `ready` returns when a request of a given deadline is decoded, and must
        not fall as the deadline rises. Takes O(log n) for each model, besides what `ready` takes.
        """
        self._age(now)
        if self._ends(max(now, free_at), request.deadline, request.high, ready) > request.deadline:
            # An earlier deadline might fit by jumping the queue; don't offer it, since others would be late.
            raise InfeasibleError(self.earliest(now, free_at, request.high, request.deadline, ready) - request.arrival)

    @property
    def expected(self) -> int:
        """How many requests are admitted and still being decoded."""
        return len(self._coming)

    def expect(self, request: Waiting[T]) -> None:
        """Count a request that was admitted and is still being decoded as load, until `forget`."""
        self._coming.push(request)

    def forget(self, request: Waiting[T]) -> None:
        """Stop counting a request as expected."""
        self._coming.remove(request)

    def submit(self, request: Waiting[T], now: float, free_at: float) -> None:
        """Queue a request. Raises InfeasibleError if its deadline can't be met: see `check`."""
        self.check(request, now, free_at)
        if not self._queue:
            self.waiting_since = now
        self._queue.push(request)

    def earliest(
        self, now: float, free_at: float, high: int, after: float = -math.inf, ready: Callable[[float], float] = at_once
    ) -> float:
        """Return the earliest deadline from `after` on that `check` would admit, for a highest level of `high`.

        If finding it takes too many tries, returns a later one that `check` would admit too.
        """
        start = max(now, free_at)
        deadline = max(self._ends(start, -math.inf, high, ready), after)
        for _ in range(_MOST_TRIED):
            if (later := self._ends(start, deadline, high, ready)) <= deadline:
                return deadline
            deadline = later
        # The latest deadline there is: only requests without one come after it.
        return max(deadline, self._ends(start, sys.float_info.max, high, ready))

    def cancel(self, request: Waiting[T]) -> bool:
        """Take a request out of the queue; returns whether it was there."""
        return self._queue.remove(request)

    def start(self, now: float) -> float:
        """Return when a free device should begin the next batch: later than `now` where the policy waits for mates.

        It waits no longer than until one mate more would make the batch late.
        """
        size, top = len(self._queue), self.latency.levels - 1
        if not 0 < size < self._size or not isinstance(self._policy, Patient):
            return now
        view = self._view(now)
        try:
            patience = self._policy.patience(view)
        except Exception:
            self.policy_failures += 1
            log.exception("the policy failed; not waiting for batch-mates")
            return now
        return min(self.waiting_since + patience, view.waiting[0].due - self.latency.promised(size + 1, top))

    def next(self, now: float) -> Decision | None:
        """Return what the free device runs next and which requests are given up, and take both out of the queue.

        None if the queue is empty.
        """
        self._age(now)
        shed = self._drop_hopeless(now)
        if not self._queue:
            return Decision((), (), shed) if shed else None
        view = self._view(now)
        try:
            decision = self._policy(view)
            _check(decision, self._queue, self.latency.max_batch)
        except Exception:
            self.policy_failures += 1
            log.exception("the policy failed; running the earliest deadlines at their most merging")
            decision = _without_policy(view)
        self._queue.take((*decision.batch, *decision.shed))
        return replace(decision, shed=(*shed, *decision.shed)) if shed else decision

    def _age(self, now: float) -> None:
        """Have the predictions of all models of the device forget what is stale."""
        self.latency.age(now)
        for other in self.others:
            other.latency.age(now)

    def _drop_hopeless(self, now: float) -> list[Waiting[T]]:
        """Take out the requests that would be late even if each ran alone, now, at its highest level."""
        dropped = []
        while (first := self._queue.first()) and now + self.latency.promised(1, first.high) > first.deadline:
            self._queue.remove(first)
            dropped.append(first)
        return dropped

    def _ends(self, start: float, deadline: float, high: int, ready: Callable[[float], float]) -> float:
        """Return when a request ends if all due by its `deadline` run from `start` on, at the most merging."""
        size, top = self._size, self.latency.levels - 1
        batches, rest = divmod(self._due_by(deadline), size)
        for other in self.others:
            start += other._work(deadline)
        begins = max(start + batches * self.latency.expected(size, top), ready(deadline))
        return begins + self.latency.promised(rest + 1, high)

    def _due_by(self, deadline: float) -> int:
        """Return how many requests are due by `deadline`, queued or still being decoded."""
        return self._queue.due_by(deadline) + self._coming.due_by(deadline)

    def _work(self, deadline: float) -> float:
        """Return the seconds that the requests due by `deadline` take, at the most merging."""
        size, top = self._size, self.latency.levels - 1
        batches, rest = divmod(self._due_by(deadline), size)
        seconds = batches * self.latency.expected(size, top)
        return seconds + self.latency.expected(rest, top) if rest else seconds

    def _view(self, now: float) -> View:
        """Return what the policy sees.

        On a shared device that is the traffic of all models, and requests that are due before their deadlines.
        """
        traffic, waiting = self._traffic.at(now), list(self._queue)
        if self.others:
            traffic = together(traffic, [(other._traffic.at(now), other._image / self._image) for other in self.others])
        for request, due in zip(waiting, self._dues(now, waiting), strict=True):
            request.due = due
        return View(now, waiting, self.latency, traffic)

    @property
    def _image(self) -> float:
        """Seconds that an image takes in the fastest batch, at the most merging."""
        return self.latency.expected(self._size, self.latency.levels - 1) / self._size

    @property
    def _size(self) -> int:
        """The batch size with the most images a second, in which work is counted."""
        return self._fastest[self.latency.max_batch - 1]

    def _dues(self, now: float, waiting: Sequence[Waiting[T]]) -> list[float]:
        """Return by when each request must be done so that it and the other models' requests are in time.

        It must be done before its deadline, less the others' work that is due earlier, and before the latest moment at
        which the others' later requests can still start in time, all at the most merging in the fastest batches. Those
        of the others that would be late even if this model ran only one image before them don't count.
        """
        if not any(map(len, self.others)):
            return [request.deadline for request in waiting]
        least = now + self.latency.promised(1, waiting[0].high)
        limits: list[tuple[float, float, float]] = []
        work = 0.0
        for deadline, expected, promised in sorted(chunk for other in self.others for chunk in other._chunks()):
            if (latest := deadline - work - promised) >= least:
                work += expected
                limits.append((deadline, latest, work))
        dues, due = [], math.inf
        for request in reversed(waiting):
            while limits and limits[-1][0] > request.deadline:
                due = min(due, limits.pop()[1])
            due = min(due, request.deadline - (limits[-1][2] if limits else 0.0))
            dues.append(due)
        dues.reverse()
        # Policies rely on this: each request could be met if it ran alone, and they come in order.
        before = -math.inf
        for place, request in enumerate(waiting):
            alone = min(now + self.latency.promised(1, request.high), request.deadline)
            before = dues[place] = max(dues[place], alone, before)
        return dues

    def _chunks(self) -> list[tuple[float, float, float]]:
        """Return the batches that the queue makes: the first member's deadline, seconds expected, and promised."""
        full, top, waiting = self._size, self.latency.levels - 1, list(self._queue)
        sizes = ((first, min(full, len(waiting) - first)) for first in range(0, len(waiting), full))
        return [
            (waiting[first].deadline, self.latency.expected(size, top), self.latency.promised(size, top))
            for first, size in sizes
        ]


def share_device(schedulers: Sequence[Scheduler[Any]]) -> None:
    """Have each of these schedulers account for the load of the others; they are all that the device has."""
    for scheduler in schedulers:
        scheduler.others = [other for other in schedulers if other is not scheduler]


def _fastest(profile: Profile) -> list[int]:
    """Return, for each largest batch size from 1 on, the size up to it that does the most images a second.

    Where latency rises steeply with the size, several small batches take less time than a large one.
    """
    sizes, best = list[int](), 0.0
    for size, row in enumerate(profile.every_size(profile.p50)[1:], 1):
        faster = size / row[-1] >= best
        best = max(best, size / row[-1])
        sizes.append(size if faster else sizes[-1])
    return sizes


def _check(decision: Decision, queue: DeadlineQueue[T], largest: int) -> None:
    """Raise ValueError if a decision breaks bounds or the batch limit, or names a request that isn't in the queue."""
    batch, levels, named = decision.batch, decision.levels, [*decision.batch, *decision.shed]
    if not named or len(set(map(id, named))) != len(named) or not queue.holds(named):
        raise ValueError("a decision must name requests in the queue, at least one, and each once")
    if len(batch) > largest or len(batch) != len(levels):
        raise ValueError(f"a batch of {len(batch)} with {len(levels)} levels, of at most {largest}")
    if not all(request.low <= level <= request.high for request, level in zip(batch, levels, strict=True)):
        raise ValueError("a level is out of its request's bounds")


def _without_policy(view: View) -> Decision:
    """Return as many of the earliest deadlines as are in time together, at the most merging."""
    top = view.latency.levels - 1
    return uniform(view.waiting[: largest(view, view.waiting, top)], top)
